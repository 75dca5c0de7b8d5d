"""A model's forward and the losses of its samples, together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from dataflex.forward.split import logits_of
from dataflex.ops import SampleLoss, per_sample_loss


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
    """losses: with gradient where the forward has one; outputs: what the model returned."""

    losses: SampleLoss
    outputs: Any


def forward(run: Callable[..., Any], inputs: Mapping[str, Tensor], counted: Counted) -> Forwarded:
    """Call ``run(**inputs)``, a model or an engine around it, for the losses of its samples.

    UserError where it returns no logits.
    """
    outputs = run(**inputs)
    return Forwarded(losses_of(logits_of(outputs), counted), outputs)


def losses_of(logits: Tensor, counted: Counted) -> SampleLoss:
    """The losses of logits [B, T, V]."""
    return per_sample_loss(
        logits.flatten(0, 1),
        counted.labels,
        counted.cu_seqlens,
        reduction=counted.reduction,
        token_weight=counted.token_weight,
        class_weight=counted.class_weight,
    )
