"""Projected per-sample gradient features, and exact scores: public functions.

Projection ``xorfold`` (the default): element (i, j) of the tensor with id t adds sign(i, j, t) * value to
bucket ((i mod R) * C + j mod C) xor K(tile, t), with R * C = proj_dim. i and j are global row and column
numbers, so that features do not depend on batch, padding, sharding or layer order, and partial sums add.
Inner products are unbiased over seeds. The other kinds are in `project_kinds`; ``kronecker`` takes
sgd only.

Exact scores need no projection: with directions [Q, ...] in the shape of the parameter, the inner product of each
sample's transformed gradient with each of them is added to `Sums.dots` [S, Q], its squared norm to `Sums.sqnorm` [S].
"""

from __future__ import annotations

import torch
from torch import Tensor

from dataflex.ops.projection import project_native
from dataflex.ops.projection.arguments import Projection, Sums
from dataflex.ops.projection.project_checks import check_tokens, collect_outputs, sample_scales, treatment

_SPAN = 1 << 31  # more rows than an embedding has


def project_per_sample_grad_(
    sums: Sums, row: Tensor, col: Tensor, cu_seqlens: Tensor, of: Projection, scale: float | Tensor = 1.0
) -> Sums:
    """Add the projection of each sample's transformed gradient of one matrix to ``sums``, and return them.

    The gradient of sample s is g_s = scale_s * sum over its tokens t of row[t] col[t]^T, complete before the transform
    is applied.

    row: [N, M] (delta of a linear layer); col: [N, K] (its input); any float dtype, summed in the dtype of ``sums``.
    cu_seqlens: [S + 1] int64; sample s is tokens cu_seqlens[s] to cu_seqlens[s + 1].
    scale: a number, or [S].
    ValueError for what does not fit. The per-sample gradients exist for some rows at a time only.
    """
    outputs = collect_outputs(sums, of.directions, cu_seqlens, row.device)
    check_tokens(row, col, cu_seqlens, outputs.samples)
    how = treatment(of, outputs, (row.shape[1], col.shape[1]))
    scales = sample_scales(scale, outputs)
    project_native.outer(outputs, row.detach(), col.detach(), cu_seqlens, scales, how)
    return sums


def project_dense_(sums: Sums, grad: Tensor, of: Projection) -> Sums:
    """The same for per-sample gradients that exist as vectors (norm weights, biases): grad [S, K].

    The vector, of shape [K] as its moments and directions are then, is row 0 of its tensor (row_offset).
    """
    if grad.dim() != 2 or (sums.out is not None and grad.shape[0] != sums.out.shape[0]):
        rows = "S" if sums.out is None else sums.out.shape[0]
        raise ValueError(f"grad: expected [{rows}, K], got {tuple(grad.shape)}")
    pieces = torch.arange(len(grad) + 1, device=grad.device)
    outputs = collect_outputs(sums, of.directions, pieces, grad.device)
    how = treatment(of, outputs, (grad.shape[1],)).each(lambda x: x[None], lambda x: x[:, None])
    ones = sample_scales(1.0, outputs)
    project_native.values(outputs, grad.detach()[:, None], None, pieces, ones, how, minus_zero=False)
    return sums


def project_rows_(
    sums: Sums,
    row_ids: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    of: Projection,
    scale: float | Tensor = 1.0,
    base: Sums | None = None,
) -> Sums:
    """The same for embeddings: token t adds scale * values[t] to row row_ids[t] of its sample's gradient.

    row_ids: [N] int64, 0 to M - 1; values: [N, K].
    base: of one sample, what rows that a sample does not touch contribute (`project_zero`); None for nothing.
    """
    outputs = collect_outputs(sums, of.directions, cu_seqlens, values.device)
    check_tokens(values, values, cu_seqlens, outputs.samples)
    if row_ids.shape != values.shape[:1] or row_ids.dtype is not torch.int64:
        raise ValueError(f"row_ids: expected int64 [{len(values)}], got {row_ids.dtype} {tuple(row_ids.shape)}")
    known = next((t.shape[-2] for t in (of.exp_avg, of.directions) if t is not None and t.dim() > 1), None)
    shape = ("M" if known is None else known, values.shape[1])
    how = treatment(of, outputs, shape)
    if row_ids.device.type == "cpu" and len(row_ids):
        low, high = int(row_ids.min()), int(row_ids.max())
        if low < 0 or (known is not None and high >= known):
            raise ValueError(f"row_ids: expected 0 to {shape[0]} - 1, got {low if low < 0 else high}")
    if base is not None:
        for total, part in zip(sums.tensors, base.tensors, strict=True):
            if total is not None and part is not None:
                total += part.to(total.dtype)
    scales = sample_scales(scale, outputs)
    grad, rows, bounds = _touched_rows(row_ids, values.detach().to(scales.dtype), cu_seqlens)
    project_native.values(outputs, grad, rows, bounds, scales, how, minus_zero=True)
    return sums


def project_zero(sums: Sums, shape: tuple[int, int], of: Projection) -> Sums:
    """Add the projection of the transform of a zero gradient of a matrix of ``shape`` to ``sums`` of one sample."""
    if of.transform.needs_moments:
        given = next(t for t in (*sums.tensors, torch.empty(0)) if t is not None)
        row, col = (torch.zeros(0, size, device=given.device) for size in shape)
        project_per_sample_grad_(sums, row, col, torch.zeros(2, dtype=torch.int64, device=given.device), of)
    return sums


def _touched_rows(row_ids: Tensor, values: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [N, 1, K] over the tokens of each (sample, row) that occurs, in order; its row [N]; bounds [S + 1].

    Only as many as there are tokens at most are known to occur without waiting for the device: behind the last one of
    the last sample there are zeros, which no sample has.
    """
    samples, tokens = len(cu_seqlens) - 1, len(row_ids)
    place = torch.arange(tokens, device=row_ids.device)
    sample = torch.bucketize(place, cu_seqlens[1:], right=True)
    key, order = torch.sort(sample * _SPAN + row_ids, stable=True)
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    group = first.cumsum(0) - 1
    lengths = torch.zeros_like(key).scatter_add_(0, group, torch.ones_like(key))
    grad = torch.segment_reduce(values[order], "sum", lengths=lengths, axis=0, unsafe=True) if tokens else values
    of_group = torch.full_like(key, (samples + 1) * _SPAN).scatter_(0, group, key)
    bounds = torch.searchsorted(of_group, torch.arange(samples + 1, device=key.device) * _SPAN)
    return grad[:, None], of_group % _SPAN, bounds
