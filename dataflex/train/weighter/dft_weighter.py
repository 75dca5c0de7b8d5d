"""`dft`: a token counts as much as the model believes in it (Dynamic Fine-Tuning, arXiv 2508.05629)."""

from __future__ import annotations

import torch
from torch import Tensor

from dataflex.core.registry import register_weighter
from dataflex.ops.losses.token_rules import TokenRows
from dataflex.train.weighter.token_weighter import TokenWeighter


@register_weighter("dft")
class DftWeighter(TokenWeighter):
    """w_t = p_t, the model's probability of the label, without gradient (equation 9 of the paper).

    The gradient of p_t times a token's loss is that of -p_t: what the model finds unlikely hardly moves it.
    """

    def of_logits(self, rows: TokenRows) -> Tensor:
        return torch.exp(-rows.losses())
