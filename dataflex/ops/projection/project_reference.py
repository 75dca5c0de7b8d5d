"""Portable reference of the projection ops: the schemas, and what they mean in plain PyTorch.

Both ops add to three outputs, each of which may have no columns (or no entries) where it is not wanted:
out [S, proj_dim], sqnorm [S] and dots [S, Q].
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dataflex.ops.projection.arguments import Outputs, Treatment
from dataflex.ops.projection.project_kinds import FOLDS, PROJECTIONS, kronecker_factors
from dataflex.ops.projection.transforms import Coefficients, transformed

_COMMON = (
    "Tensor? exp_avg, Tensor? exp_avg_sq, float[] coefficients, Tensor? directions, int kind, int seed, "
    "int tensor_id, int row_offset, int col_offset"
)
OUTER_SCHEMA = (
    "project_outer(Tensor(a!) out, Tensor(b!) sqnorm, Tensor(c!) dots, Tensor row, Tensor col, Tensor cu_seqlens, "
    f"Tensor scale, {_COMMON}) -> ()"
)
VALUES_SCHEMA = (
    "project_values(Tensor(a!) out, Tensor(b!) sqnorm, Tensor(c!) dots, Tensor grad, Tensor? row_ids, "
    f"Tensor bounds, Tensor scale, {_COMMON}, bool minus_zero) -> ()"
)
_CHUNK_BYTES = 64 << 20
_SMALLEST_CHUNK = 64


def project_outer(
    outputs: Outputs, row: Tensor, col: Tensor, cu_seqlens: Tensor, scale: Tensor, how: Treatment
) -> None:
    """Each sample's scale * sum of row[t] col[t]^T, transformed, projected; at most 64 MiB of gradients at a time."""
    bounds: list[int] = cu_seqlens.tolist()
    out = outputs.out
    if PROJECTIONS[how.kind] == "kronecker" and out.shape[1]:
        _kronecker_outer(out, row, col, bounds, scale, how)
        outputs = replace(outputs, out=out[:, :0])
        if not outputs.sqnorm.numel() and not outputs.dots.numel():
            return
    row_bytes = max(1, out.element_size() * len(scale) * col.shape[1])
    per_chunk = max(1, _CHUNK_BYTES // (row_bytes * _SMALLEST_CHUNK)) * _SMALLEST_CHUNK
    pieces = torch.arange(len(bounds), device=out.device)
    for start in range(0, row.shape[1], per_chunk):
        end = start + per_chunk
        grad = outer_sums(row[:, start:end].to(out.dtype), col.to(out.dtype), bounds)
        project_values(outputs, grad, None, pieces, scale, how.rows(start, end), minus_zero=False)


def project_values(
    outputs: Outputs,
    grad: Tensor,
    row_ids: Tensor | None,
    bounds: Tensor,
    scale: Tensor,
    how: Treatment,
    *,
    minus_zero: bool,
) -> None:
    """grad [P, m, k]: pieces bounds[s] to bounds[s + 1] belong to sample s, bounds int64 [S + 1]; others to none.

    Sample s has the factor scale[s]. A piece is rows 0 to m of the matrix, or, with row_ids int64 [P] (m = 1), its
    row row_ids[p].
    minus_zero: take away the transform of a zero gradient.
    """
    out, sqnorm, dots = outputs.tensors
    by = Coefficients(*how.coefficients) if how.coefficients else None
    cut: list[int] = bounds.tolist()
    columns = torch.arange(grad.shape[2], device=grad.device) + how.col_offset
    local = torch.arange(grad.shape[1], device=grad.device) if row_ids is None else row_ids
    wide = [None if x is None else x[local].to(out.dtype) for x in (how.exp_avg, how.exp_avg_sq)]
    if row_ids is None:
        assert cut == list(range(len(grad) + 1)), "without row_ids every sample has one piece"
        value = transformed(by, grad.to(out.dtype) * scale[:, None, None], *wide)
        _add(outputs, value, local, columns, how)
        return
    if cut[-1] < len(grad):
        grad, local, wide = grad[: cut[-1]], local[: cut[-1]], [None if x is None else x[: cut[-1]] for x in wide]
    factor = torch.repeat_interleave(scale, bounds.diff())
    value = transformed(by, grad[:, 0].to(out.dtype) * factor[:, None], *wide)
    base = transformed(by, torch.zeros_like(value), *wide) if minus_zero else torch.zeros_like(value)
    for s, (a, b) in enumerate(zip(cut[:-1], cut[1:], strict=True)):
        one = slice(s, s + 1)
        change, before = value[None, a:b] - base[None, a:b], base[None, a:b]
        _add(Outputs(out[one], sqnorm[:0], dots[one]), change, local[a:b], columns, how)
        if sqnorm.numel():
            sqnorm[s] += ((change + before) ** 2 - before**2).sum(dtype=torch.float64)


def _add(outputs: Outputs, value: Tensor, local: Tensor, columns: Tensor, how: Treatment) -> None:
    """Add values [S, m, k] of the matrix's rows ``local`` [m] and global ``columns`` [k] to the outputs."""
    out, sqnorm, dots = outputs.tensors
    if out.shape[1]:
        FOLDS[PROJECTIONS[how.kind]](out, value, local + how.row_offset, columns, how.tensor_id, how.seed)
    if sqnorm.numel():
        sqnorm += value.flatten(1).square().sum(1, dtype=torch.float64)
    if dots.numel():
        assert how.directions is not None
        dots += value.flatten(1) @ how.directions[:, local].to(value.dtype).flatten(1).T


def _kronecker_outer(out: Tensor, row: Tensor, col: Tensor, bounds: list[int], scale: Tensor, how: Treatment) -> None:
    """(P row_t)(Q col_t)^T summed over tokens: the gradients need not exist."""
    rows = torch.arange(row.shape[1], device=out.device) + how.row_offset
    columns = torch.arange(col.shape[1], device=out.device) + how.col_offset
    left, right = kronecker_factors(rows, columns, how.tensor_id, how.seed, out.shape[1], out.dtype)
    small = outer_sums(row.to(out.dtype) @ left, col.to(out.dtype) @ right, bounds)
    out += small.flatten(1) * scale.to(out.dtype)[:, None]


def outer_sums(row: Tensor, col: Tensor, bounds: list[int]) -> Tensor:
    """[S, M, K]: each sample's sum of row[t] col[t]^T."""
    samples, tokens = len(bounds) - 1, row.shape[0]
    if samples and tokens and bounds == list(range(0, tokens + 1, max(1, tokens // samples))):
        by_sample = row.reshape(samples, -1, row.shape[1]), col.reshape(samples, -1, col.shape[1])
        return torch.bmm(by_sample[0].transpose(1, 2), by_sample[1])
    pieces = [row[a:b].T @ col[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return torch.stack(pieces) if pieces else row.new_zeros(0, row.shape[1], col.shape[1])
