"""`eaft`: a token counts as much as the model is in doubt there (EAFT, arXiv 2601.02151)."""

from __future__ import annotations

import torch
from torch import Tensor

from dataflex.core.registry import register_weighter
from dataflex.ops.losses.token_rules import TokenRows
from dataflex.train.weighter.token_weighter import TokenWeighter
from dataflex.utils.errors import UserError

# About the entropy of 20 equally likely tokens, ln 20 = 2.996, by which LLaMA-Factory divides.
_SCALE = 3.0


@register_weighter("eaft")
class EaftWeighter(TokenWeighter):
    """w_t = (H_t / 3) ** alpha, H_t: entropy in nats of the ``top`` largest probabilities, which are made to sum to 1.

    Labels that a model is sure are wrong ("confident conflicts") count little. alpha: 0 weighs nothing, larger ones
    sharpen.
    """

    def __init__(self, alpha: float = 1.0, top: int = 20) -> None:
        if not alpha >= 0:
            raise UserError(f"eaft weighter: alpha: must be >= 0, got {alpha}")
        if not isinstance(top, int) or top < 2:
            raise UserError(f"eaft weighter: top: must be a whole number >= 2, got {top}")
        self.alpha, self.top = float(alpha), top

    def of_logits(self, rows: TokenRows) -> Tensor:
        entropy = torch.special.entr(torch.softmax(rows.largest(self.top), 1)).sum(1)
        return (entropy / _SCALE) ** self.alpha
