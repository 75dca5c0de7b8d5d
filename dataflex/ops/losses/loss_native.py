"""The internal ops of the loss, implemented in csrc: schemas, shapes, autograd, and when they can be used."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dataflex.ops.losses.loss_options import LossOptions
from dataflex.ops.losses.loss_reference import fold, fold_keys
from dataflex.ops.native import _ext

_INPUTS = "Tensor labels, Tensor cu_seqlens, Tensor? token_weight, Tensor? class_weight"
_SCALARS = (
    "int ignore_index, bool mean, float label_smoothing, float z_loss, float softcap, int vocab_offset, bool sharded"
)
_GRADS = "Tensor lse, Tensor lse_low, Tensor count, Tensor? grad_loss, Tensor? grad_token, Tensor? grad_lse"
_TABLES = "Tensor keys, Tensor signs, Tensor? uniform, int k1"
_SKETCHES = (64, 8192)


def _fake_forward(logits: Tensor, labels: Tensor, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, ...]:
    tokens, samples = logits.shape[0], cu_seqlens.shape[0] - 1
    loss = logits.new_empty(samples, dtype=torch.float32)
    count = logits.new_empty(samples, dtype=torch.int64)
    token_loss = logits.new_empty(tokens, dtype=torch.float32)
    return loss, count, token_loss, torch.empty_like(token_loss), torch.empty_like(token_loss)


def _fake_sketch(logits: Tensor, labels: Tensor, cu_seqlens: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    sketch = logits.new_empty(logits.shape[0], rest[-2], dtype=torch.float32)
    return *_fake_forward(logits, labels, cu_seqlens), sketch


def _fake_backward(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _nothing(*_: Any) -> None:
    """The fake of an op that only changes its argument."""


_ext.define(
    f"loss_forward(Tensor logits, {_INPUTS}, {_SCALARS}, bool inplace) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_forward,
)
_ext.define(
    f"loss_sketch(Tensor logits, {_INPUTS}, {_SCALARS}, {_TABLES}, bool inplace)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_sketch,
)
_ext.define(f"loss_backward(Tensor logits, {_INPUTS}, {_GRADS}, {_SCALARS}) -> Tensor", fake=_fake_backward)
_ext.define(f"loss_backward_(Tensor(a!) logits, {_INPUTS}, {_GRADS}, {_SCALARS}) -> ()", fake=_nothing)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Both forwards: logits, labels, cu_seqlens and the weights; seven scalars; ...; inplace."""
    _, count, _, lse, lse_low, *sketch = output
    ctx.save_for_backward(*inputs[:5], lse, lse_low, count)
    ctx.scalars, ctx.inplace, ctx.arguments = inputs[5:12], inputs[-1], len(inputs)
    ctx.mark_non_differentiable(count, lse_low, *sketch)
    ctx.set_materialize_grads(False)


def _differentiate(ops: Any) -> Any:
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, cu_seqlens, token_weight, class_weight, lse, lse_low, count = ctx.saved_tensors
        wanted = [None if g is None else g.contiguous() for g in (grads[0], *grads[2:4])]
        arguments = (labels, cu_seqlens, token_weight, class_weight, lse, lse_low, count, *wanted, *ctx.scalars)
        others = (None,) * (ctx.arguments - 1)
        if not ctx.inplace:
            return ops.loss_backward(logits, *arguments), *others
        # A second backward, or any other use of the logits, now is PyTorch's error and not a wrong number.
        torch.autograd.graph.increment_version(logits)
        ops.loss_backward_(logits, *arguments)
        return logits, *others

    return backward


for _space in sorted(set(_ext.NAMESPACES.values())):
    for _op in ("loss_forward", "loss_sketch"):
        _backward = _differentiate(getattr(torch.ops, _space))
        torch.library.register_autograd(f"{_space}::{_op}", _backward, setup_context=_save)


def native_ops(logits: Tensor) -> Any | None:
    """The namespace whose ops take these logits, or None for the reference."""
    return None if logits.dtype is torch.float64 else _ext.ops_for(logits.device)


def takes_sketch(k1: int, options: LossOptions) -> bool:
    """Whether the ops have this sketch; the reference has the others."""
    return _SKETCHES[0] <= k1 <= _SKETCHES[1] and not (options.softcap and options.label_smoothing)


def rows(logits: Tensor) -> Tensor:
    """The logits as the ops take them: columns next to each other, rows that may be apart."""
    apart = logits.shape[0] < 2 or logits.stride(0) >= logits.shape[1]
    return logits if logits.stride(1) == 1 and apart else logits.contiguous()


def weights(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().to(torch.float32).contiguous()


@lru_cache(8)
def sketch_tables(columns: int, k1: int, seed: int, tensor_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 keys [ceil(V / k1)], and the signs as bits: int32 [4 ceil(V / 128)], 1 for -1."""
    keys = fold_keys(columns, k1, seed, tensor_id).to(torch.int32)
    padded = -(-columns // 128) * 128
    negative = (fold(padded, k1, seed, tensor_id)[1] < 0).view(-1, 32).to(torch.int64)
    words = (negative << torch.arange(32)).sum(1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return keys.to(device), words.to(device)


def uniform_sketch(
    columns: int, k1: int, seed: int, tensor_id: int, class_weight: Tensor | None, device: torch.device
) -> Tensor:
    """float32 [k1]: the fold of the class weights, which label smoothing spreads its share by."""
    bucket, sign = (t.to(device) for t in fold(columns, k1, seed, tensor_id))
    values = sign.double() if class_weight is None else sign.double() * class_weight
    return torch.zeros(k1, dtype=torch.float64, device=device).index_add_(0, bucket, values).float()
