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
from dataflex.ops.known import counted_positions
from dataflex.ops.losses.token_rules import TokenRows, TokenRule

_RULED_ROWS = 512
# Names of a backward's nodes: products, those that keep what they returned, and what may stand between.
_PRODUCTS = ("mmbackward", "linear")
_KEEPERS = ("tanh", "exp", "sigmoid", "softmax")
_BETWEEN = (
    *("view", "alias", "slice", "select", "copy", "clone", "transpose", "permute", "squeeze", "accumulategrad"),
    *("mul", "div", "add", "sub", "neg", "log", "prebackward", "postbackward", "backwardhook"),
)


class Forward:
    """How the batches of one model become losses. fused: its output layer, where losses can be made inside of it.

    keeps_logits: the logits may be looked at after the backward. Else their gradient takes their place, unless the
    model's own backward needs their values.
    """

    def __init__(self, fused: FusedHead | None = None, *, keeps_logits: bool = True) -> None:
        self.fused = fused
        self.keeps_logits = keeps_logits

    def __call__(
        self,
        run: Callable[..., Any],
        inputs: Mapping[str, Tensor],
        counted: Counted,
        *,
        factors: Tensor | None = None,
        watch: Watch | None = None,
        rule: TokenRule | None = None,
    ) -> Forwarded:
        """Call ``run(**inputs)``, the model or an engine around it, for the losses of its samples.

        factors: [N], where the backward will be of sum(factors * token_loss) and nothing else: the gradient of a
        trained output layer without logits is then made with the losses. watch: is shown the call of an output layer
        without logits. rule: makes a number of each token's logits; where there are factors, they multiply the token's.
        UserError where the model returns no logits.
        """
        fused = self.fused
        if fused is not None and fused.pays(len(counted.labels), backward=torch.is_grad_enabled()):
            return fused.losses(run, inputs, counted, factors, watch, rule)
        outputs = run(**inputs)
        logits = logits_of(outputs)
        losses = losses_of(logits, counted, inplace=not self.keeps_logits and overwritable(logits))
        numbers = None if rule is None else _numbers(rule, logits.detach().flatten(0, 1), counted.labels, losses.lse)
        return Forwarded(losses, outputs, numbers=numbers)


def losses_of(logits: Tensor, counted: Counted, *, inplace: bool = False) -> SampleLoss:
    """The losses of logits [B, T, V]. inplace: in the backward the gradient takes their place."""
    return per_sample_loss(
        logits.flatten(0, 1),
        counted.labels,
        counted.cu_seqlens,
        reduction=counted.reduction,
        token_weight=counted.token_weight,
        class_weight=counted.class_weight,
        inplace_backward=inplace,
    )


def overwritable(logits: Tensor) -> bool:
    """Whether the backward that leads to ``logits`` is known to do without their values.

    It does not where they are what an operation that keeps its result returned, as tanh does. What comes after the last
    product is looked at: a product makes new numbers and does not keep them, and what is saved before it may be made
    again by activation checkpointing where it is asked for.
    """
    place, nodes = logits.untyped_storage().data_ptr(), [logits.grad_fn]
    while nodes:
        node = nodes.pop()
        name = "" if node is None else node.name().lower()
        if node is None or any(word in name for word in _PRODUCTS):
            continue
        if any(word in name for word in _KEEPERS):
            kept = getattr(node, "_saved_result", None)
            if not torch.is_tensor(kept) or kept.untyped_storage().data_ptr() == place:
                return False
        elif not any(word in name for word in _BETWEEN):
            return False
        nodes += [before for before, _ in node.next_functions if before is not None]
    return logits.requires_grad


@torch.no_grad()
def _numbers(rule: TokenRule, logits: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
    """[N], what ``rule`` makes of logits [N, V], a few rows at a time; 0 where a token does not count."""
    numbers = torch.zeros_like(lse)
    for rows in torch.split(counted_positions(labels), _RULED_ROWS):
        numbers[rows] = rule(TokenRows(logits[rows], labels[rows], lse[rows])).to(lse.dtype)
    return numbers
