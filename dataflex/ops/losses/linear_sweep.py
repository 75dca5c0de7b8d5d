"""The loss of a linear head in one sweep over chunks of tokens, and its gradients: in that sweep, or in another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataflex.ops.known import counted_positions
from dataflex.ops.losses.loss_dispatch import Fold, SampleLoss, SketchedLoss, loss_of_logits, sketched_loss_of_logits
from dataflex.ops.losses.loss_options import LossOptions

_SLICE_BYTES = 32 << 20


@dataclass(frozen=True)
class Sweep:
    """How the sweep goes: ``chunk_tokens`` rows of logits at a time, which are scale * (sum of x W^T + bias).

    half_logits: in the inputs' dtype, not in float32. fold: of the sketch, where one is wanted.
    """

    options: LossOptions
    chunk_tokens: int = 1024
    scale: float = 1.0
    half_logits: bool = False
    fold: Fold | None = None


class Weights(NamedTuple):
    """token: [N], multiplies the tokens' losses; of_class: [V]; factors: [N], of the tokens' losses in their total."""

    token: Tensor | None = None
    of_class: Tensor | None = None
    factors: Tensor | None = None


class Products(NamedTuple):
    """What the logits are made of: pairs (x [N, K], W [V, K]) and bias [V]."""

    pairs: tuple[tuple[Tensor, Tensor], ...]
    bias: Tensor | None = None

    def flat(self) -> tuple[Tensor | None, ...]:
        return self.bias, *(t for pair in self.pairs for t in pair)

    @staticmethod
    def of(bias: Tensor | None, *flat: Tensor) -> Products:
        return Products(tuple(zip(flat[0::2], flat[1::2], strict=True)), bias)

    def logits(self, rows: Tensor, scale: float, half: bool) -> Tensor:
        """[n, V] of the tokens at ``rows``, summed and kept in float32 (float64 of float64 inputs) unless ``half``."""
        (x, weight), *others = self.pairs
        logits = _product(x[rows], weight, half)
        for x, weight in others:
            logits += _product(x[rows], weight, half)
        if self.bias is not None:
            logits += self.bias
        return logits if scale == 1.0 else logits.mul_(scale)


def sweep_losses(
    products: Products, labels: Tensor, weights: Weights, how: Sweep
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """(total, token_loss [N], lse [N], sketch [N, k1]).

    total: sum of factors * token_loss, the one that has a gradient where there are factors: then the gradients of all
    inputs are made in the sweep itself, in three products. None without factors, where token_loss and lse have one.
    """
    made = _LinearLoss.apply(how, labels, *weights, *products.flat())  # type: ignore[no-untyped-call]
    total, token_loss, lse, sketch = made
    return (total if weights.factors is not None else None), token_loss, lse, sketch


def chunks(labels: Tensor, how: Sweep) -> Iterator[Tensor]:
    """The positions of the tokens that count, so many at a time."""
    return iter(torch.split(counted_positions(labels, how.options.ignore_index), how.chunk_tokens))


def _product(x: Tensor, weight: Tensor, half: bool) -> Tensor:
    """[n, V] x @ weight.T."""
    if half or x.dtype in (torch.float32, torch.float64):
        return x @ weight.T
    if x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    out = x.new_empty(len(x), len(weight), dtype=torch.float32)
    wide = x.float()
    for part in _slices(weight):
        out[:, part] = wide @ weight[part].float().T
    return out


def _times_weight(grad: Tensor, weight: Tensor) -> Tensor:
    """[n, K] grad [n, V] @ weight, in the weight's dtype."""
    if weight.is_cuda or weight.dtype == grad.dtype:
        return grad.to(weight.dtype) @ weight
    out = grad.new_zeros(len(grad), weight.shape[1])
    for part in _slices(weight):
        out.addmm_(grad[:, part], weight[part].float())
    return out.to(weight.dtype)


def _add_outer_(out: Tensor, grad: Tensor, x: Tensor) -> None:
    """out [V, K] += grad [n, V].T @ x [n, K], the sum in out's dtype."""
    if grad.dtype == out.dtype == x.dtype:
        out.addmm_(grad.T, x)
    elif x.is_cuda:
        out += torch.mm(grad.to(x.dtype).T, x, out_dtype=out.dtype)
    elif grad.dtype == out.dtype:
        out.addmm_(grad.T, x.to(out.dtype))
    else:
        for part in _slices(out):
            out[part] += grad[:, part].T @ x


def _slices(weight: Tensor) -> Iterator[slice]:
    """Rows of the weight whose float32 copy is small: CPUs multiply that faster and more exactly."""
    rows = max(1, _SLICE_BYTES // (4 * weight.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(weight), rows))


class _Gradients:
    """Those of the bias and of each x and W that wants one; of W and bias summed in float32."""

    def __init__(self, products: Products, needs: tuple[bool, ...], how: Sweep) -> None:
        def zeros(like: Tensor, wide: bool) -> Tensor:
            exact = torch.float64 if like.dtype is torch.float64 else torch.float32
            return torch.zeros_like(like, dtype=exact if wide else like.dtype)

        self.products, self.scale = products, how.scale
        flat = products.flat()
        wide = [place % 2 == 0 for place in range(len(flat))]  # bias, x, W, x, W, ...
        self.sums = [
            zeros(t, w) if need and t is not None else None for t, need, w in zip(flat, needs, wide, strict=True)
        ]

    def add(self, rows: Tensor, grad: Tensor) -> None:
        """What the tokens at ``rows`` contribute; grad: [n, V] by their logits, changed in place."""
        if self.scale != 1.0:
            grad.mul_(self.scale)
        bias, *rest = self.sums
        if bias is not None:
            bias += grad.sum(0, dtype=bias.dtype)
        for (x, weight), by_x, by_weight in zip(self.products.pairs, rest[0::2], rest[1::2], strict=True):
            if by_x is not None:
                by_x[rows] = _times_weight(grad, weight)
            if by_weight is not None:
                _add_outer_(by_weight, grad, x[rows])

    def take(self) -> list[Tensor | None]:
        """In the dtypes of the inputs."""
        flat = self.products.flat()
        return [None if s is None or t is None else s.to(t.dtype) for s, t in zip(self.sums, flat, strict=True)]


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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        products, hidden = Products.of(*flat), flat[1]
        needs = ctx.needs_input_grad[5:]
        exact = torch.float64 if hidden.dtype is torch.float64 else torch.float32
        token_loss, lse = (hidden.new_zeros(len(hidden), dtype=exact) for _ in range(2))
        sketch = None if how.fold is None else hidden.new_zeros(len(hidden), how.fold.k1, dtype=exact)
        trained = needs[0] or any(needs[2::2])
        at_once = any(needs) and not how.options.sharded and (factors is not None or not trained)
        grads = _Gradients(products, needs, how) if at_once else None
        by = None if factors is None else _unit(factors)
        for rows in chunks(labels, how):
            one = _one_sample(rows, labels, token_weight, class_weight, how)
            by_loss = None if by is None else by[rows]
            result, grad = _with_gradient(
                products.logits(rows, how.scale, how.half_logits), *one, wanted=at_once, by_loss=by_loss
            )
            token_loss[rows], lse[rows] = result.token_loss, result.lse
            if sketch is not None and isinstance(result, SketchedLoss):
                sketch[rows] = result.sketch
            if grads is not None and grad is not None:
                grads.add(rows, grad)
        ctx.save_for_backward(labels, token_weight, class_weight, factors, *flat)
        ctx.how, ctx.unit = how, None if grads is None else grads.sums
        ctx.set_materialize_grads(False)
        fixed = [sketch] if sketch is not None else []
        if factors is None:
            total = token_loss.new_zeros(())
            ctx.mark_non_differentiable(total, *fixed)
        else:
            total = (token_loss * factors.to(exact)).sum()
            ctx.mark_non_differentiable(token_loss, lse, *fixed)
        return total, token_loss, lse, sketch

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        by_total, by_loss, by_lse, _ = grads
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
) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor | None, LossOptions], Fold | None]:
    """What `loss_of_logits` takes after the logits, for the tokens at ``rows`` as one sample; and the fold."""
    ends = torch.arange(2, device=rows.device) * len(rows)
    weight = None if token_weight is None else token_weight[rows]
    return (labels[rows], ends, weight, class_weight, how.options), how.fold


def _with_gradient(
    logits: Tensor,
    arguments: tuple[Tensor, Tensor, Tensor | None, Tensor | None, LossOptions],
    fold: Fold | None,
    *,
    wanted: bool,
    by_loss: Tensor | None = None,
    by_lse: Tensor | None = None,
) -> tuple[SampleLoss | SketchedLoss, Tensor | None]:
    """A chunk's loss and, where wanted, the gradient of sum(by_loss * token_loss + by_lse * lse), in the logits' place.

    by_loss, by_lse: [n]; where both are None, by_loss is ones.
    """

    def loss(x: Tensor) -> SampleLoss | SketchedLoss:
        if fold is None:
            return loss_of_logits(x, *arguments, inplace=True)
        return sketched_loss_of_logits(x, *arguments, fold, inplace=True)

    if not wanted:
        return loss(logits), None
    with torch.enable_grad():
        leaf = logits.requires_grad_()
        result = loss(leaf)
    if by_loss is None and by_lse is None:
        by_loss = torch.ones_like(result.token_loss)
    pairs = [(o, g.to(o.dtype)) for o, g in ((result.token_loss, by_loss), (result.lse, by_lse)) if g is not None]
    (grad,) = torch.autograd.grad([o for o, _ in pairs], leaf, [g for _, g in pairs])
    return type(result)(*(part.detach() for part in result)), grad.detach()


def _again(ctx: Any, by_loss: Tensor | None, by_lse: Tensor | None) -> list[Tensor | None]:
    """Gradients of bias, x and W, from logits that are made again chunk by chunk."""
    labels, token_weight, class_weight, _, *flat = ctx.saved_tensors
    how: Sweep = ctx.how
    products = Products.of(*flat)
    grads = _Gradients(products, ctx.needs_input_grad[5:], how)
    for rows in chunks(labels, how):
        if by_loss is None and by_lse is None:
            break
        parts = [None if g is None else g[rows] for g in (by_loss, by_lse)]
        arguments, _ = _one_sample(rows, labels, token_weight, class_weight, how)
        logits = products.logits(rows, how.scale, how.half_logits)
        _, grad = _with_gradient(logits, arguments, None, wanted=True, by_loss=parts[0], by_lse=parts[1])
        assert grad is not None
        grads.add(rows, grad)
    return grads.take()
