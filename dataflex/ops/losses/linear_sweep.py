"""The loss of a linear head in one sweep over chunks of tokens, and its gradients: in that sweep, or in another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataflex.ops.known import counted_positions
from dataflex.ops.losses.linear_products import Gradients, Products
from dataflex.ops.losses.loss_dispatch import Fold, SampleLoss, SketchedLoss, loss_of_logits, sketched_loss_of_logits
from dataflex.ops.losses.loss_options import LossOptions
from dataflex.ops.losses.token_rules import TokenRows, TokenRule

LossArguments = tuple[Tensor, Tensor, Tensor | None, Tensor | None, LossOptions]


@dataclass(frozen=True)
class Sweep:
    """How the sweep goes: ``chunk_tokens`` rows of logits at a time, which are scale * (sum of x W^T + bias).

    half_logits: in the inputs' dtype, not in float32. fold: of the sketch, where one is wanted. rule: of numbers that
    are made of the logits, where they are wanted.
    """

    options: LossOptions
    chunk_tokens: int = 1024
    scale: float = 1.0
    half_logits: bool = False
    fold: Fold | None = None
    rule: TokenRule | None = None


class Weights(NamedTuple):
    """token: [N], multiplies the tokens' losses; of_class: [V]; factors: [N], of the tokens' losses in their total."""

    token: Tensor | None = None
    of_class: Tensor | None = None
    factors: Tensor | None = None


class Swept(NamedTuple):
    """total: sum of factors (and ``numbers``, where there is a rule) * token_loss, of which the gradient is made then.

    None without factors, where token_loss [N] and lse [N] have a gradient. sketch: [N, k1]; numbers: [N], of the rule,
    0 where a token does not count; both without gradient, and None where they are not wanted.
    """

    total: Tensor | None
    token_loss: Tensor
    lse: Tensor
    sketch: Tensor | None
    numbers: Tensor | None


def sweep_losses(products: Products, labels: Tensor, weights: Weights, how: Sweep) -> Swept:
    """The losses of the logits that ``products`` make.

    Where there are factors, and where no W has a gradient, those of all inputs are made in the sweep itself, in three
    products; else the backward makes the logits again.
    """
    made = _LinearLoss.apply(how, labels, *weights, *products.flat())  # type: ignore[no-untyped-call]
    return Swept(made[0] if weights.factors is not None else None, *made[1:])


def chunks(labels: Tensor, how: Sweep) -> Iterator[Tensor]:
    """The positions of the tokens that count, so many at a time."""
    return iter(torch.split(counted_positions(labels, how.options.ignore_index), how.chunk_tokens))


class _LinearLoss(torch.autograd.Function):
    """how, labels, the weights, bias, x, W, x, W, ... -> what `sweep_losses` returns."""

    @staticmethod
    def forward(
        ctx: Any,
        how: Sweep,
        labels: Tensor,
        token_weight: Tensor | None,
        class_weight: Tensor | None,
        factors: Tensor | None,
        *flat: Any,
    ) -> tuple[Tensor | None, ...]:
        products, hidden = Products.of(*flat), flat[1]
        needs = ctx.needs_input_grad[5:]
        exact = torch.float64 if hidden.dtype is torch.float64 else torch.float32
        token_loss, lse = (hidden.new_zeros(len(hidden), dtype=exact) for _ in range(2))
        sketch = None if how.fold is None else hidden.new_zeros(len(hidden), how.fold.k1, dtype=exact)
        numbers = None if how.rule is None else torch.zeros_like(token_loss)
        trained = needs[0] or any(needs[2::2])
        at_once = any(needs) and not how.options.sharded and (factors is not None or not trained)
        grads = Gradients(products, needs, how.scale) if at_once else None
        by = None if factors is None else _unit(factors)
        for rows in chunks(labels, how):
            arguments, fold = _one_sample(rows, labels, token_weight, class_weight, how)
            chunk = _Chunk(products.logits(rows, how.scale, how.half_logits), arguments, fold, wanted=at_once)
            result = chunk.result
            token_loss[rows], lse[rows] = result.token_loss.detach(), result.lse.detach()
            if sketch is not None and isinstance(result, SketchedLoss):
                sketch[rows] = result.sketch
            if numbers is not None and how.rule is not None:
                view = TokenRows(chunk.logits.detach(), labels[rows], lse[rows], how.options.softcap)
                numbers[rows] = how.rule(view).to(exact)
            if grads is not None:
                grads.add(rows, chunk.gradient(None if by is None else _times(by[rows], numbers, rows)))
            del chunk, result  # before the next one's logits are made
        ctx.save_for_backward(labels, token_weight, class_weight, factors, *flat)
        ctx.how, ctx.unit = how, None if grads is None else grads.sums
        ctx.set_materialize_grads(False)
        fixed = [t for t in (sketch, numbers) if t is not None]
        if factors is None:
            total = token_loss.new_zeros(())
            ctx.mark_non_differentiable(total, *fixed)
        else:
            total = (token_loss * _times(factors, numbers, slice(None)).to(exact)).sum()
            ctx.mark_non_differentiable(token_loss, lse, *fixed)
        return total, token_loss, lse, sketch, numbers

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        by_total, by_loss, by_lse, *_ = grads
        factors = ctx.saved_tensors[3]
        if factors is not None:
            found = _scaled(ctx, by_total, factors)
        elif ctx.unit is not None and by_lse is None and by_loss is not None:
            found = [None if unit is None else (unit * by_loss[:, None]).to(unit.dtype) for unit in ctx.unit]
        else:
            found = _again(ctx, by_loss, by_lse)
        return *(None,) * 5, *found


def _unit(factors: Tensor) -> Tensor:
    """The factors with 1 as the largest, so that gradients made in half precision do not vanish."""
    return factors / _largest(factors)


def _times(factors: Tensor, numbers: Tensor | None, rows: Tensor | slice) -> Tensor:
    return factors if numbers is None else factors * numbers[rows]


def _largest(factors: Tensor) -> Tensor:
    most = factors.abs().amax() if len(factors) else factors.new_ones(())
    return torch.where(most > 0, most, 1.0)


def _scaled(ctx: Any, by_total: Tensor | None, factors: Tensor) -> list[Tensor | None]:
    """The gradients of the sweep times that of the total; taken, so that they are not there twice."""
    if by_total is None:
        return [None] * len(ctx.needs_input_grad[5:])
    if ctx.unit is None:
        raise RuntimeError("linear loss: its gradients, made in the forward, were taken by a first backward")
    sums, ctx.unit = ctx.unit, None
    by = by_total * _largest(factors)
    dtypes = [None if t is None else t.dtype for t in ctx.saved_tensors[4:]]
    return [None if s is None else s.mul_(by).to(dtype) for s, dtype in zip(sums, dtypes, strict=True)]


def _one_sample(
    rows: Tensor, labels: Tensor, token_weight: Tensor | None, class_weight: Tensor | None, how: Sweep
) -> tuple[LossArguments, Fold | None]:
    """What `loss_of_logits` takes after the logits, for the tokens at ``rows`` as one sample; and the fold."""
    ends = torch.arange(2, device=rows.device) * len(rows)
    weight = None if token_weight is None else token_weight[rows]
    return (labels[rows], ends, weight, class_weight, how.options), how.fold


class _Chunk:
    """A chunk's loss, and its gradient in the logits' place, where one is wanted.

    arguments, fold: of `_one_sample`. logits [n, V] keep their values until `gradient` is called, once.
    """

    def __init__(self, logits: Tensor, arguments: LossArguments, fold: Fold | None, *, wanted: bool) -> None:
        self.logits = logits.requires_grad_() if wanted else logits
        with torch.set_grad_enabled(wanted):
            if fold is None:
                self.result: SampleLoss | SketchedLoss = loss_of_logits(self.logits, *arguments, inplace=True)
            else:
                self.result = sketched_loss_of_logits(self.logits, *arguments, fold, inplace=True)

    def gradient(self, by_loss: Tensor | None, by_lse: Tensor | None = None) -> Tensor:
        """[n, V] of sum(by_loss * token_loss + by_lse * lse); by_loss, by_lse: [n], ones and nothing without both."""
        result = self.result
        if by_loss is None and by_lse is None:
            by_loss = torch.ones_like(result.token_loss)
        pairs = [(o, g.to(o.dtype)) for o, g in ((result.token_loss, by_loss), (result.lse, by_lse)) if g is not None]
        (grad,) = torch.autograd.grad([o for o, _ in pairs], self.logits, [g for _, g in pairs])
        return grad.detach()


def _again(ctx: Any, by_loss: Tensor | None, by_lse: Tensor | None) -> list[Tensor | None]:
    """Gradients of bias, x and W, from logits that are made again chunk by chunk."""
    labels, token_weight, class_weight, _, *flat = ctx.saved_tensors
    how: Sweep = ctx.how
    products = Products.of(*flat)
    grads = Gradients(products, ctx.needs_input_grad[5:], how.scale)
    for rows in chunks(labels, how):
        if by_loss is None and by_lse is None:
            break
        parts = [None if g is None else g[rows] for g in (by_loss, by_lse)]
        arguments, _ = _one_sample(rows, labels, token_weight, class_weight, how)
        chunk = _Chunk(products.logits(rows, how.scale, how.half_logits), arguments, None, wanted=True)
        grads.add(rows, chunk.gradient(*parts))
        del chunk
    return grads.take()
