"""The losses of arguments that were checked: by the native ops where they are, else by the reference."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dataflex.ops.losses import loss_native as native
from dataflex.ops.losses import loss_reference as reference
from dataflex.ops.losses.loss_options import LossOptions


class SampleLoss(NamedTuple):
    """loss [S], count [S] int64 (tokens that counted), token_loss [N] and lse [N] (0 where a token did not count).

    float32, or float64 of float64 logits. loss, token_loss and lse carry gradients.
    """

    loss: Tensor
    count: Tensor  # type: ignore[assignment]
    token_loss: Tensor
    lse: Tensor


class SketchedLoss(NamedTuple):
    """The same, and sketch [N, k1] float32 (0 where a token did not count; no gradient)."""

    loss: Tensor
    count: Tensor  # type: ignore[assignment]
    token_loss: Tensor
    lse: Tensor
    sketch: Tensor


class Fold(NamedTuple):
    """Which xor-fold of the vocabulary: k1 buckets (a power of two), the seed and the tensor's id."""

    k1: int
    seed: int
    tensor_id: int


def loss_of_logits(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    inplace: bool = False,
) -> SampleLoss:
    """`dataflex.ops.per_sample_loss`."""
    ops = native.native_ops(logits)
    if ops is None:
        token_loss, lse = reference.token_losses(logits, labels, token_weight, class_weight, options)
        loss, count = reference.sample_losses(token_loss, labels, cu_seqlens, options.ignore_index, options.mean)
        return SampleLoss(loss, count, token_loss, lse)
    tensors = labels.contiguous(), cu_seqlens.contiguous(), native.weights(token_weight), native.weights(class_weight)
    return SampleLoss(*ops.loss_forward(native.rows(logits), *tensors, *options.scalars(), inplace)[:4])


def sketched_loss_of_logits(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    fold: Fold,
    inplace: bool = False,
) -> SketchedLoss:
    """`dataflex.ops.loss_and_head_sketch` of logits."""
    columns, device = logits.shape[1], logits.device
    ops = native.native_ops(logits)
    if ops is None or not native.takes_sketch(fold.k1, options):
        loss = loss_of_logits(logits, labels, cu_seqlens, token_weight, class_weight, options, inplace)
        bucket, sign = (t.to(device) for t in reference.fold(columns, *fold))
        sketch = reference.sketch(logits, labels, token_weight, class_weight, options, bucket, sign, fold.k1)
        return SketchedLoss(*loss, sketch)
    tensors = labels.contiguous(), cu_seqlens.contiguous(), native.weights(token_weight), native.weights(class_weight)
    even = native.uniform_sketch(columns, *fold, class_weight, device) if options.label_smoothing else None
    tables = *native.sketch_tables(columns, *fold, device), even, fold.k1
    made = ops.loss_sketch(native.rows(logits), *tensors, *options.scalars(), *tables, inplace)
    loss, count, token_loss, lse, _, sketch = made
    return SketchedLoss(loss, count, token_loss, lse, sketch)
