"""Projected per-sample gradient features, and exact scores: public functions.

Projection ``xorfold`` (the default): element (i, j) of the tensor with id t adds sign(i, j, t) * value to
bucket ((i mod R) * C + j mod C) xor K(tile, t), with R * C = proj_dim. i and j are global row and column
numbers, so that features do not depend on batch, padding, sharding or layer order, and partial sums add.
Inner products are unbiased over seeds. The other kinds are in `project_kinds`; ``kronecker`` takes
sgd only.

Exact scores need no projection: with ``directions`` [Q, ...] in the shape of the parameter, the inner product of each
sample's transformed gradient with each of them is added to ``dots`` [S, Q], its squared norm to ``sqnorm`` [S].
"""

from __future__ import annotations

import torch
from torch import Tensor

from dataflex.ops.projection import project_native
from dataflex.ops.projection.project_checks import check_tokens, collect_outputs, sample_scales, treatment
from dataflex.ops.projection.transforms import Transform

_SPAN = 1 << 31  # more rows than an embedding has


def project_per_sample_grad_(
    out: Tensor | None,
    row: Tensor,
    col: Tensor,
    cu_seqlens: Tensor,
    *,
    transform: Transform,
    seed: int,
    tensor_id: int,
    exp_avg: Tensor | None = None,
    exp_avg_sq: Tensor | None = None,
    scale: float | Tensor = 1.0,
    row_offset: int = 0,
    col_offset: int = 0,
    projection: str = "xorfold",
    sqnorm: Tensor | None = None,
    directions: Tensor | None = None,
    dots: Tensor | None = None,
) -> Tensor | None:
    """Add the projection of each sample's transformed gradient of one matrix to ``out``.

    The gradient of sample s is g_s = scale_s * sum over its tokens t of row[t] col[t]^T, complete before
    ``transform`` is applied.

    out: [S, proj_dim] float32 or float64, changed in place and returned; None for exact scores only.
    row: [N, M] (delta of a linear layer); col: [N, K] (its input); any float dtype, summed in out's dtype.
    cu_seqlens: [S + 1] int64; sample s is tokens cu_seqlens[s] to cu_seqlens[s + 1].
    exp_avg, exp_avg_sq: [M, K], Adam's moments of the matrix, needed unless the transform is sgd.
    scale: a number, or [S].
    row_offset, col_offset: global position of element (0, 0), for sharded matrices.
    projection: one of `project_kinds.PROJECTIONS`. seed: 0 to 2^63 - 1.
    sqnorm: [S], the squared norm of what is projected is added to it. directions: [Q, M, K]; dots: [S, Q], the inner
    products with them are added to it. Both in out's dtype.
    ValueError for what does not fit. The per-sample gradients exist for some rows at a time only.
    """
    outputs = collect_outputs(out, sqnorm, dots, directions, cu_seqlens, row.device)
    check_tokens(row, col, cu_seqlens, outputs.samples)
    m, k = row.shape[1], col.shape[1]
    how = treatment(
        outputs, transform, exp_avg, exp_avg_sq, directions, (m, k), projection, seed, tensor_id, row_offset, col_offset
    )
    scales = sample_scales(scale, outputs)
    project_native.outer(outputs, row.detach(), col.detach(), cu_seqlens, scales, how)
    return out


def project_dense_(
    out: Tensor | None,
    grad: Tensor,
    *,
    transform: Transform,
    seed: int,
    tensor_id: int,
    exp_avg: Tensor | None = None,
    exp_avg_sq: Tensor | None = None,
    col_offset: int = 0,
    projection: str = "xorfold",
    sqnorm: Tensor | None = None,
    directions: Tensor | None = None,
    dots: Tensor | None = None,
) -> Tensor | None:
    """The same for per-sample gradients that exist as vectors (norm weights, biases): grad [S, K].

    The vector is row 0 of its tensor. exp_avg, exp_avg_sq: [K]; directions: [Q, K].
    """
    if grad.dim() != 2 or (out is not None and grad.shape[0] != out.shape[0]):
        rows = "S" if out is None else out.shape[0]
        raise ValueError(f"grad: expected [{rows}, K], got {tuple(grad.shape)}")
    pieces = torch.arange(len(grad) + 1, device=grad.device)
    outputs = collect_outputs(out, sqnorm, dots, directions, pieces, grad.device)
    how = treatment(
        outputs,
        transform,
        exp_avg,
        exp_avg_sq,
        directions,
        (grad.shape[1],),
        projection,
        seed,
        tensor_id,
        0,
        col_offset,
    )
    how = how.each(lambda x: x[None], lambda x: x[:, None])
    ones = sample_scales(1.0, outputs)
    project_native.values(outputs, grad.detach()[:, None], None, pieces, ones, how, minus_zero=False)
    return out


def project_rows_(
    out: Tensor | None,
    row_ids: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    transform: Transform,
    seed: int,
    tensor_id: int,
    base: Tensor | None = None,
    exp_avg: Tensor | None = None,
    exp_avg_sq: Tensor | None = None,
    scale: float | Tensor = 1.0,
    row_offset: int = 0,
    col_offset: int = 0,
    projection: str = "xorfold",
    sqnorm: Tensor | None = None,
    directions: Tensor | None = None,
    dots: Tensor | None = None,
    base_sqnorm: Tensor | None = None,
    base_dots: Tensor | None = None,
) -> Tensor | None:
    """The same for embeddings: token t adds scale * values[t] to row row_ids[t] of its sample's gradient.

    row_ids: [N] int64, 0 to M - 1; values: [N, K]; exp_avg, exp_avg_sq: [M, K].
    base: [proj_dim], the projection of the transform of a zero gradient (`project_zero`): rows that a sample
    does not touch contribute that; None for nothing. base_sqnorm: [1] and base_dots: [1, Q] likewise.
    """
    outputs = collect_outputs(out, sqnorm, dots, directions, cu_seqlens, values.device)
    check_tokens(values, values, cu_seqlens, outputs.samples)
    if row_ids.shape != values.shape[:1] or row_ids.dtype is not torch.int64:
        raise ValueError(f"row_ids: expected int64 [{len(values)}], got {row_ids.dtype} {tuple(row_ids.shape)}")
    known = exp_avg.shape[0] if exp_avg is not None else directions.shape[1] if directions is not None else None
    shape = ("M" if known is None else known, values.shape[1])
    how = treatment(
        outputs, transform, exp_avg, exp_avg_sq, directions, shape, projection, seed, tensor_id, row_offset, col_offset
    )
    if row_ids.device.type == "cpu" and len(row_ids):
        low, high = int(row_ids.min()), int(row_ids.max())
        if low < 0 or (known is not None and high >= known):
            raise ValueError(f"row_ids: expected 0 to {shape[0]} - 1, got {low if low < 0 else high}")
    for total, part in zip(outputs.tensors, (base, base_sqnorm, base_dots), strict=True):
        if part is not None and total.numel():
            total += part.to(total.dtype)
    scales = sample_scales(scale, outputs)
    grad, rows, bounds = _touched_rows(row_ids, values.detach().to(scales.dtype), cu_seqlens)
    project_native.values(outputs, grad, rows, bounds, scales, how, minus_zero=True)
    return out


def project_zero(
    shape: tuple[int, int],
    proj_dim: int,
    *,
    transform: Transform,
    seed: int,
    tensor_id: int,
    exp_avg: Tensor | None = None,
    exp_avg_sq: Tensor | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
    projection: str = "xorfold",
    sqnorm: Tensor | None = None,
    directions: Tensor | None = None,
    dots: Tensor | None = None,
) -> Tensor:
    """Projection [proj_dim] of the transform of a zero gradient of a matrix of ``shape``; sqnorm [1], dots [1, Q]."""
    like = exp_avg if exp_avg is not None else torch.empty(0)
    out = torch.zeros(1, proj_dim, device=like.device, dtype=torch.float32)
    if transform.needs_moments:
        nothing = torch.zeros(0, shape[0], device=out.device), torch.zeros(0, shape[1], device=out.device)
        project_per_sample_grad_(
            out if proj_dim else None,
            *nothing,
            torch.zeros(2, dtype=torch.int64, device=out.device),
            transform=transform,
            seed=seed,
            tensor_id=tensor_id,
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            row_offset=row_offset,
            col_offset=col_offset,
            projection=projection,
            sqnorm=sqnorm,
            directions=directions,
            dots=dots,
        )
    return out[0]


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
