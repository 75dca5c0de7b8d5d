"""Per-sample loss with the sketched gradient of the logits: the first stage of the head's gradient features."""

from __future__ import annotations

from torch import Tensor

from dataflex.ops.losses.linear_products import Products
from dataflex.ops.losses.linear_sweep import Sweep, Weights
from dataflex.ops.losses.loss_dispatch import Fold, SketchedLoss, sketched_loss_of_logits
from dataflex.ops.losses.loss_linear import check_linear, linear_losses
from dataflex.ops.losses.loss_options import LossOptions, check_loss


def loss_and_head_sketch(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    *,
    k1: int,
    seed: int,
    tensor_id: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    chunk_tokens: int = 1024,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    inplace_backward: bool = False,
) -> SketchedLoss:
    """`per_sample_loss`, and each token's gradient of its token_loss by the logits, folded to k1 numbers in the same
    read: without options (softmax - onehot) folded.

    logits: [N, V]; or, with ``weight`` [V, H] (and ``bias``), the hidden states [N, H] as `linear_per_sample_loss`
    takes them. Column v is added to bucket (v mod k1) xor K(v div k1), negated where its bit is set: row 0 of the
    tensor ``tensor_id`` under the xor-fold with a tile of one row and k1 columns (a power of two >= 2).
    A sample's head gradient is the sum over its tokens of sketch[t] x hidden[t] (over its count for a mean), for
    `project_per_sample_grad_`. Everything else is as in `per_sample_loss`, which see for errors.
    """
    if k1 < 2 or k1 & (k1 - 1):
        raise ValueError(f"k1: expected a power of two >= 2, got {k1}")
    fold = Fold(k1, seed, tensor_id)
    options = LossOptions(ignore_index, reduction, label_smoothing, z_loss, softcap)
    tensors = labels, cu_seqlens, token_weight, class_weight
    if weight is not None:
        check_linear(logits, weight, bias, *tensors, chunk_tokens, options)
        how = Sweep(options, chunk_tokens, fold=fold)
        weights = Weights(token_weight, class_weight)
        loss, _, sketch = linear_losses(Products(((logits, weight),), bias), labels, cu_seqlens, weights, how)
        assert sketch is not None
        return SketchedLoss(*loss, sketch)
    if bias is not None:
        raise ValueError("bias: expected none without weight, got one")
    if logits.dim() != 2:
        raise ValueError(f"logits: expected [N, V], got {tuple(logits.shape)}")
    check_loss("logits", logits, logits.shape[1], *tensors, options)
    return sketched_loss_of_logits(logits, *tensors, options, fold, inplace_backward)
