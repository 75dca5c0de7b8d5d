"""The portable reference of the per-sample loss: plain PyTorch, differentiable, float64 where the logits are.

With x the logits (after softcap: c tanh(x / c)), lse = ln sum exp(x), y the label, o the class weights (1 without),
e the label smoothing and w the token's weight, a token's loss is

    w ((1 - e) o_y (lse - x_y) + e / V sum_v o_v (lse - x_v) + z lse^2)

which is `torch.nn.functional.cross_entropy` with its weight and label_smoothing, and the z-loss of PaLM
(arXiv 2204.02311, section 5). Tokens that do not count have loss 0, lse 0 and gradient 0, whatever their logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dataflex.ops.losses.loss_options import LossOptions
from dataflex.ops.projection.hashing import philox, signs

_BUCKET_STREAM = 0x4B4B4B4B
_CHUNK_ELEMENTS = 1 << 24


def token_losses(
    logits: Tensor,
    labels: Tensor,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """Loss [N] and lse [N] of each token, float32 (float64 of float64 logits)."""
    tokens, vocabulary = logits.shape
    counted = (labels != options.ignore_index).nonzero()[:, 0]
    x = logits if len(counted) == tokens else logits[counted]
    x = x if x.dtype is torch.float64 else x.float()
    if options.softcap:
        x = options.softcap * torch.tanh(x / options.softcap)
    peak = x.detach().amax(1)
    peak = torch.where(peak.isfinite(), peak, 0.0)
    below = x - peak[:, None]
    log_sum = _log_sum_of_shard(below) if options.sharded else below.logsumexp(1)
    column = labels[counted] - (options.vocab_offset or 0)
    here = (column >= 0) & (column < vocabulary)
    place = column.clamp(0, vocabulary - 1)
    elsewhere = -peak if options.sharded else torch.full_like(peak, torch.nan)
    loss = log_sum - torch.where(here, below.gather(1, place[:, None])[:, 0], elsewhere)
    lse = log_sum + peak
    smoothing = options.label_smoothing
    if class_weight is not None:
        loss = loss * class_weight.to(x.dtype)[place]
    if smoothing:
        weight = x.new_ones(vocabulary) if class_weight is None else class_weight.to(x.dtype)
        spread = ((log_sum[:, None] - below) * weight).sum(1)
        loss = (1.0 - smoothing) * loss + smoothing / vocabulary * spread
    if options.z_loss:
        loss = loss + options.z_loss * lse.square()
    if token_weight is not None:
        loss = loss * token_weight.to(x.dtype)[counted]
    nothing = x.new_zeros(tokens)
    return nothing.index_copy(0, counted, loss), nothing.index_copy(0, counted, lse)


def _log_sum_of_shard(below: Tensor) -> Tensor:
    """logsumexp [N] of [N, V]; a row of -inf only gets gradient 0 instead of NaN, since other shards make the sum."""
    empty = (below == -torch.inf).all(1)
    if not empty.any():
        return below.logsumexp(1)
    return below.masked_fill(empty[:, None], 0.0).logsumexp(1).masked_fill(empty, -torch.inf)


def sample_losses(
    token_loss: Tensor, labels: Tensor, cu_seqlens: Tensor, ignore_index: int, mean: bool
) -> tuple[Tensor, Tensor]:
    """Loss [S] and count [S] (int64) of each sample."""
    lengths = cu_seqlens.diff()
    loss = torch.segment_reduce(token_loss, "sum", lengths=lengths, unsafe=True)
    counted = (labels != ignore_index).to(torch.float64)
    count = torch.segment_reduce(counted, "sum", lengths=lengths, unsafe=True).to(torch.int64)
    return (loss / count.clamp(min=1) if mean else loss), count


def fold_keys(columns: int, k1: int, seed: int, tensor_id: int) -> Tensor:
    """int64 [ceil(columns / k1)]: what the places of each stretch of k1 columns are xor-ed with."""
    return philox((torch.arange(-(-columns // k1)), 0, tensor_id, _BUCKET_STREAM), seed)[0] & (k1 - 1)


def fold(columns: int, k1: int, seed: int, tensor_id: int) -> tuple[Tensor, Tensor]:
    """Bucket (int64) and sign (float32) of each column: the xor-fold with a tile of one row and k1 columns."""
    column = torch.arange(columns)
    sign = signs(torch.zeros(1, dtype=torch.int64), column, tensor_id, seed)[0]
    return (column % k1) ^ fold_keys(columns, k1, seed, tensor_id)[column // k1], sign


def sketch(
    logits: Tensor,
    labels: Tensor,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    bucket: Tensor,
    sign: Tensor,
    k1: int,
) -> Tensor:
    """[N, k1]: each row of the token losses' gradient by the logits, folded by ``bucket`` and ``sign`` [V]."""
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    parts = []
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        with torch.enable_grad():
            x = logits[part].detach()
            x = (x if x.dtype is torch.float64 else x.float()).requires_grad_()
            weight = None if token_weight is None else token_weight[part]
            loss, _ = token_losses(x, labels[part], weight, class_weight, options)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
        parts.append(gradient.new_zeros(len(x), k1).index_add_(1, bucket, gradient * sign.to(x.dtype)))
    exact = torch.float64 if logits.dtype is torch.float64 else torch.float32
    return torch.cat(parts) if parts else logits.new_zeros(0, k1, dtype=exact)
