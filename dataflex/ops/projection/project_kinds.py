"""The projections of matrices of values, portable: each adds [S, m, k] values to features [S, proj_dim].

Inner products of features are unbiased over seeds: E<P a, P b> = <a, b>, with variance
(|a|^2 |b|^2 + <a, b>^2 - 2 sum a^2 b^2) / proj_dim for every kind but ``kronecker``, whose is larger.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dataflex.ops.projection.hashing import (
    SPARSITY,
    buckets,
    count_buckets,
    dense_signs,
    factor_signs,
    signs,
    sparse_buckets,
    tile_shape,
)

PROJECTIONS = ("xorfold", "countsketch", "sjlt", "rademacher", "kronecker")
_SIGNS_AT_ONCE = 1 << 22

Projection = Callable[[Tensor, Tensor, Tensor, Tensor, int, int], None]


def check_proj_dim(projection: str, proj_dim: int) -> None:
    """ValueError unless ``projection`` can have ``proj_dim`` outputs."""
    if projection not in PROJECTIONS:
        raise ValueError(f"projection: expected one of {', '.join(PROJECTIONS)}, got {projection!r}")
    if projection in ("xorfold", "kronecker"):
        tile_shape(proj_dim)
    elif proj_dim < 1 or (projection == "sjlt" and proj_dim % SPARSITY):
        expected = f"a multiple of {SPARSITY}" if projection == "sjlt" else "at least 1"
        raise ValueError(f"proj_dim: {projection} expects {expected}, got {proj_dim}")


def xorfold(out: Tensor, value: Tensor, rows: Tensor, columns: Tensor, tid: int, seed: int) -> None:
    signed = (value * signs(rows, columns, tid, seed).to(value.dtype)).flatten(1)
    place = buckets(rows, columns, tid, seed, out.shape[1]).flatten()
    out.scatter_add_(1, place.expand(out.shape[0], -1), signed)


def countsketch(out: Tensor, value: Tensor, rows: Tensor, columns: Tensor, tid: int, seed: int) -> None:
    sign, place = count_buckets(rows, columns, tid, seed, out.shape[1])
    out.scatter_add_(1, place.flatten().expand(out.shape[0], -1), (value * sign.to(value.dtype)).flatten(1))


def sjlt(out: Tensor, value: Tensor, rows: Tensor, columns: Tensor, tid: int, seed: int) -> None:
    sign, place = sparse_buckets(rows, columns, tid, seed, out.shape[1])
    for quarter in range(SPARSITY):
        signed = value * (sign[quarter] * SPARSITY**-0.5).to(value.dtype)
        out.scatter_add_(1, place[quarter].flatten().expand(out.shape[0], -1), signed.flatten(1))


def rademacher(out: Tensor, value: Tensor, rows: Tensor, columns: Tensor, tid: int, seed: int) -> None:
    """Signs for some columns of one row at a time, never all: m k proj_dim of them would not fit."""
    proj_dim = out.shape[1]
    width = max(1, _SIGNS_AT_ONCE // proj_dim)
    for r in range(len(rows)):
        for start in range(0, len(columns), width):
            part = slice(start, start + width)
            sign = dense_signs(rows[r : r + 1], columns[part], tid, seed, proj_dim)[0].to(value.dtype)
            out.addmm_(value[:, r, part], sign, alpha=proj_dim**-0.5)


def kronecker(out: Tensor, value: Tensor, rows: Tensor, columns: Tensor, tid: int, seed: int) -> None:
    left, right = kronecker_factors(rows, columns, tid, seed, out.shape[1], value.dtype)
    out += (left.T @ value @ right).flatten(1)


def kronecker_factors(
    rows: Tensor, columns: Tensor, tid: int, seed: int, proj_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """[m, k1] and [k, k2], scaled, k1 * k2 = proj_dim: the feature is left^T value right."""
    k1, k2 = tile_shape(proj_dim)
    left = factor_signs(rows, tid, seed, k1, left=True).to(dtype) * k1**-0.5
    return left, factor_signs(columns, tid, seed, k2, left=False).to(dtype) * k2**-0.5


FOLDS: dict[str, Projection] = {
    "xorfold": xorfold,
    "countsketch": countsketch,
    "sjlt": sjlt,
    "rademacher": rademacher,
    "kronecker": kronecker,
}
