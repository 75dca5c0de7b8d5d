"""A model's forward and the losses of its samples, together: with logits, or without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dataflex.forward.counted import Counted, Forwarded
from dataflex.forward.fused import FusedHead, Watch
from dataflex.forward.split import logits_of
from dataflex.ops import SampleLoss, per_sample_loss


class Forward:
    """How the batches of one model become losses. fused: its output layer, where losses can be made inside of it."""

    def __init__(self, fused: FusedHead | None = None) -> None:
        self.fused = fused

    def __call__(
        self,
        run: Callable[..., Any],
        inputs: Mapping[str, Tensor],
        counted: Counted,
        *,
        factors: Tensor | None = None,
        watch: Watch | None = None,
    ) -> Forwarded:
        """Call ``run(**inputs)``, the model or an engine around it, for the losses of its samples.

        factors: [N], where the backward will be of sum(factors * token_loss) and nothing else: the gradient of a
        trained output layer without logits is then made with the losses. watch: is shown the call of an output layer
        without logits. UserError where the model returns no logits.
        """
        fused = self.fused
        if fused is not None and fused.pays(len(counted.labels), backward=torch.is_grad_enabled()):
            return fused.losses(run, inputs, counted, factors, watch)
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
