"""What goes into the losses of a forward besides the model, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from dataflex.ops import SampleLoss


@dataclass(frozen=True)
class Counted:
    """What a forward's losses are made of, besides its logits.

    labels: [N] int64, shifted; cu_seqlens: [S + 1] int64; token_weight: [N]; class_weight: [V]; reduction: ``mean`` or
    ``sum``: as `dataflex.ops.per_sample_loss` takes them.
    """

    labels: Tensor
    cu_seqlens: Tensor
    reduction: str = "mean"
    token_weight: Tensor | None = None
    class_weight: Tensor | None = None


class Forwarded(NamedTuple):
    """losses: with gradient where the forward has one, unless ``total`` has it; outputs: what the model returned.

    total: sum of factors (and ``numbers``) * token_loss, where its gradient was made with the losses. numbers: [N], of
    the rule for the tokens' logits, 0 where a token does not count.
    """

    losses: SampleLoss
    outputs: Any
    total: Tensor | None = None
    numbers: Tensor | None = None
