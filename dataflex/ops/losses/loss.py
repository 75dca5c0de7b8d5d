"""Per-sample loss over logits: the public functions.

Formulas and portable reference: `dataflex.ops.losses.loss_reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dataflex.ops.losses import loss_reference as reference
from dataflex.ops.losses.loss_dispatch import SampleLoss, loss_of_logits
from dataflex.ops.losses.loss_options import LossOptions, check_loss

__all__ = ["SampleLoss", "merge_vocab_shards", "per_sample_loss", "shift_labels"]


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Next-token targets: labels [B, T] int64 to [B * T] int64, position t holding the label of t + 1."""
    shifted = torch.full_like(labels, ignore_index)
    shifted[:, :-1] = labels[:, 1:]
    return shifted.reshape(-1)


def per_sample_loss(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    vocab_offset: int | None = None,
    inplace_backward: bool = False,
) -> SampleLoss:
    """Cross-entropy of each sample, with gradient to the logits. One read of the logits, no copy of their size.

    logits: [N, V] float32, bfloat16 or float16; computed in float32 (float64 stays float64).
    labels: [N] int64, already shifted; tokens equal to ``ignore_index`` do not count and are not read.
    cu_seqlens: [S + 1] int64, sample s is tokens cu_seqlens[s] to cu_seqlens[s + 1].
    reduction: ``mean`` over a sample's counted tokens, or ``sum``. A sample without a counted token has loss 0,
    count 0 and gradient 0. A row that is not finite spoils its own sample only.
    token_weight: [N], multiplies each token's loss. class_weight: [V], as in `torch.nn.CrossEntropyLoss`. Neither
    changes the count, and neither gets a gradient from the native ops.
    label_smoothing: as in `torch.nn.CrossEntropyLoss`. z_loss: adds z_loss * lse^2 to each token's loss.
    softcap: the loss of softcap * tanh(logits / softcap), where it is not 0.
    vocab_offset: the logits are the columns vocab_offset to vocab_offset + V of a larger vocabulary; a token whose
    label lies elsewhere has token_loss = lse. `merge_vocab_shards` makes the whole loss, and takes the weights.
    inplace_backward: the gradient may overwrite the logits, which nothing else may need then.
    ValueError for shapes, dtypes, devices and numbers that do not fit, and, on the CPU, for labels and segments
    out of range; elsewhere a label out of range makes its own sample's loss NaN.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits: expected [N, V], got {tuple(logits.shape)}")
    options = LossOptions(ignore_index, reduction, label_smoothing, z_loss, softcap, vocab_offset)
    check_loss("logits", logits, logits.shape[1], labels, cu_seqlens, token_weight, class_weight, options)
    return loss_of_logits(logits, labels, cu_seqlens, token_weight, class_weight, options, inplace_backward)


def merge_vocab_shards(
    shards: Sequence[SampleLoss],
    labels: Tensor,
    cu_seqlens: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    z_loss: float = 0.0,
) -> SampleLoss:
    """The loss over a whole vocabulary from `per_sample_loss` of each of its shards (with ``vocab_offset``).

    labels, cu_seqlens, ignore_index: as given to the shards. token_weight [N], class_weight [V of the whole] and
    z_loss as in `per_sample_loss`. Differentiable: each shard's logits get their part of the gradient.
    """
    if not shards:
        raise ValueError("shards: expected at least one, got none")
    options = LossOptions(ignore_index, reduction, z_loss=z_loss)
    tokens = shards[0].lse.shape[0]
    if any(shard.lse.shape != (tokens,) for shard in shards):
        raise ValueError(f"shards: expected the same tokens in all, got {[len(shard.lse) for shard in shards]}")
    vocabulary = (1 << 62) if class_weight is None else class_weight.shape[0]
    check_loss("shards", shards[0].lse, vocabulary, labels, cu_seqlens, token_weight, class_weight, options)
    counted = labels != ignore_index
    each = torch.stack([torch.where(counted, shard.lse, 0.0) for shard in shards])
    lse = torch.where(counted, each.logsumexp(0), 0.0)
    token_loss = lse
    for shard in shards:
        elsewhere = shard.lse.isinf() & (shard.token_loss == shard.lse)
        token_loss = token_loss - torch.where(elsewhere, 0.0, shard.lse - shard.token_loss)
    for weight, at in ((class_weight, labels.where(counted, 0)), (token_weight, None)):
        if weight is not None:
            token_loss = token_loss * (weight if at is None else weight[at]).to(lse.dtype)
    if z_loss:
        scale = z_loss if token_weight is None else z_loss * token_weight.to(lse.dtype)
        token_loss = token_loss + scale * lse.square()
    token_loss = torch.where(counted, token_loss, 0.0)
    loss, count = reference.sample_losses(token_loss, labels, cu_seqlens, ignore_index, options.mean)
    return SampleLoss(loss, count, token_loss, lse)
