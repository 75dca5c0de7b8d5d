"""Per-sample loss of a linear head without its logits: chunks of tokens, one float32 buffer of logits at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dataflex.ops import loss_reference as reference
from dataflex.ops.loss_dispatch import Fold, SampleLoss, SketchedLoss, loss_of_logits, sketched_loss_of_logits
from dataflex.ops.loss_options import LossOptions, check_loss

_SLICE_BYTES = 32 << 20


def linear_per_sample_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_tokens: int = 1024,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    vocab_offset: int | None = None,
) -> SampleLoss:
    """`per_sample_loss` of the logits hidden @ weight.T + bias, of which only ``chunk_tokens`` rows exist at a time.

    hidden: [N, H]; weight: [V, H] of the same dtype; bias: [V] or None. A chunk's logits are float32 (float64 of
    float64 inputs), whatever the inputs; tokens that do not count are not multiplied at all. Peak memory is
    chunk_tokens * V * 4 bytes, with half as much again for half-precision inputs' gradients; it does not grow with N.
    Where only ``hidden`` needs a gradient it is made in the same sweep as the loss; else the backward makes the
    logits again, and from them the gradients of hidden, weight and bias. The gradients of weight and bias are summed
    in float32. Everything else is as in `per_sample_loss`.
    """
    options = LossOptions(ignore_index, reduction, label_smoothing, z_loss, softcap, vocab_offset)
    check_linear(hidden, weight, bias, labels, cu_seqlens, token_weight, class_weight, chunk_tokens, options)
    head = hidden, weight, bias
    loss, _ = linear_loss(head, labels, cu_seqlens, token_weight, class_weight, options, chunk_tokens)
    return loss


def linear_loss(
    head: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    cu_seqlens: Tensor,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    chunk_tokens: int,
    fold: Fold | None = None,
) -> tuple[SampleLoss, Tensor | None]:
    """The loss of arguments that were checked, and its sketch [N, k1] where ``fold`` asks for one."""
    token_loss, lse, sketch = _LinearLoss.apply(  # type: ignore[no-untyped-call]
        *head, labels, token_weight, class_weight, options, chunk_tokens, fold
    )
    loss, count = reference.sample_losses(token_loss, labels, cu_seqlens, options.ignore_index, options.mean)
    return SampleLoss(loss, count, token_loss, lse), sketch


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    chunk_tokens: int,
    options: LossOptions,
) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"hidden: expected [N, H], got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: expected [V, {hidden.shape[1]}], got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (hidden.dtype, hidden.device):
            got = f"{tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name}: expected {hidden.dtype} on {hidden.device} like hidden, got {got}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: expected at least 1, got {chunk_tokens}")
    check_loss("hidden", hidden, weight.shape[0], labels, cu_seqlens, token_weight, class_weight, options)


def chunks(labels: Tensor, ignore_index: int, chunk_tokens: int) -> Iterator[Tensor]:
    """The positions of the tokens that count, so many at a time."""
    return iter(torch.split((labels != ignore_index).nonzero()[:, 0], chunk_tokens))


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[n, V] hidden @ weight.T + bias, summed and kept in float32 (float64 of float64 inputs)."""
    if hidden.dtype in (torch.float32, torch.float64):
        logits = hidden @ weight.T
    elif hidden.is_cuda:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
        wide = hidden.float()
        for part in _slices(weight):
            logits[:, part] = wide @ weight[part].float().T
    return logits if bias is None else logits.add_(bias)


def _times_weight(grad: Tensor, weight: Tensor) -> Tensor:
    """[n, H] grad [n, V] @ weight, in the weight's dtype."""
    if weight.is_cuda or weight.dtype == grad.dtype:
        return grad.to(weight.dtype) @ weight
    out = grad.new_zeros(len(grad), weight.shape[1])
    for part in _slices(weight):
        out.addmm_(grad[:, part], weight[part].float())
    return out.to(weight.dtype)


def _slices(weight: Tensor) -> Iterator[slice]:
    """Rows of the weight whose float32 copy is small: CPUs multiply that faster and more exactly."""
    rows = max(1, _SLICE_BYTES // (4 * weight.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(weight), rows))


class _LinearLoss(torch.autograd.Function):
    """hidden, weight, bias, labels, weights -> token_loss [N], lse [N], sketch [N, k1] or None."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        token_weight: Tensor | None,
        class_weight: Tensor | None,
        options: LossOptions,
        chunk_tokens: int,
        fold: Fold | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        exact = torch.float64 if hidden.dtype is torch.float64 else torch.float32
        token_loss, lse = (hidden.new_zeros(len(hidden), dtype=exact) for _ in range(2))
        sketch = None if fold is None else hidden.new_zeros(len(hidden), fold.k1, dtype=exact)
        at_once = ctx.needs_input_grad[:3] == (True, False, False) and not options.sharded
        unit = torch.zeros_like(hidden) if at_once else None
        for rows in chunks(labels, options.ignore_index, chunk_tokens):
            logits = head_logits(hidden[rows], weight, bias)
            one = _one_sample(rows, labels, token_weight, class_weight, options)
            result, grad = _with_gradient(logits, *one, fold, wanted=at_once)
            token_loss[rows], lse[rows] = result.token_loss, result.lse
            if sketch is not None and isinstance(result, SketchedLoss):
                sketch[rows] = result.sketch
            if unit is not None and grad is not None:
                unit[rows] = _times_weight(grad, weight)
        ctx.save_for_backward(hidden, weight, bias, labels, token_weight, class_weight, unit)
        ctx.options, ctx.chunk_tokens = options, chunk_tokens
        ctx.set_materialize_grads(False)
        if sketch is not None:
            ctx.mark_non_differentiable(sketch)
        return token_loss, lse, sketch

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        unit = ctx.saved_tensors[-1]
        by_loss, by_lse, _ = grads
        if unit is not None and by_lse is None and by_loss is not None:
            return (unit * by_loss[:, None]).to(unit.dtype), *(None,) * 8
        return *_again(ctx, by_loss, by_lse), *(None,) * 6


def _one_sample(
    rows: Tensor,
    labels: Tensor,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, LossOptions]:
    """What `loss_of_logits` takes after the logits, for the tokens at ``rows`` as one sample."""
    ends = torch.tensor([0, len(rows)]).to(rows.device, non_blocking=True)
    weight = None if token_weight is None else token_weight[rows]
    return labels[rows], ends, weight, class_weight, options


def _with_gradient(
    logits: Tensor,
    labels: Tensor,
    ends: Tensor,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    fold: Fold | None,
    *,
    wanted: bool,
    by_loss: Tensor | None = None,
    by_lse: Tensor | None = None,
) -> tuple[SampleLoss | SketchedLoss, Tensor | None]:
    """A chunk's loss and, where wanted, the gradient of sum(by_loss * token_loss + by_lse * lse), in the logits' place.

    by_loss, by_lse: [n]; where both are None, by_loss is ones.
    """
    arguments = labels, ends, token_weight, class_weight, options

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
    pairs = [(o, g) for o, g in ((result.token_loss, by_loss), (result.lse, by_lse)) if g is not None]
    (grad,) = torch.autograd.grad([o for o, _ in pairs], leaf, [g for _, g in pairs])
    return type(result)(*(part.detach() for part in result)), grad.detach()


def _again(ctx: Any, by_loss: Tensor | None, by_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias, from logits that are made again chunk by chunk."""
    hidden, weight, bias, labels, token_weight, class_weight, _ = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    exact = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
    grad_bias = torch.zeros_like(bias, dtype=exact) if needs_bias else None
    for rows in chunks(labels, ctx.options.ignore_index, ctx.chunk_tokens):
        if by_loss is None and by_lse is None:
            break
        part = hidden[rows]
        parts = [None if g is None else g[rows] for g in (by_loss, by_lse)]
        one = _one_sample(rows, labels, token_weight, class_weight, ctx.options)
        logits = head_logits(part, weight, bias)
        _, grad = _with_gradient(logits, *one, None, wanted=True, by_loss=parts[0], by_lse=parts[1])
        assert grad is not None
        if grad_hidden is not None:
            grad_hidden[rows] = _times_weight(grad, weight)
        if grad_weight is not None:
            _add_outer_(grad_weight, grad, part)
        if grad_bias is not None:
            grad_bias += grad.sum(0)
    made = zip((grad_hidden, grad_weight, grad_bias), (hidden, weight, bias), strict=True)
    return tuple(None if g is None else g.to(like.dtype) for g, like in made)


def _add_outer_(out: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """out [V, H] += grad [n, V].T @ hidden [n, H], the sum in out's dtype."""
    if hidden.is_cuda and hidden.dtype != out.dtype:
        out += torch.mm(grad.to(hidden.dtype).T, hidden, out_dtype=out.dtype)
    else:
        out.addmm_(grad.T, hidden.to(out.dtype))
