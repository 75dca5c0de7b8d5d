"""What the tests of the projections share: cases drawn by hypothesis, and features in float64 by another road."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from dataflex.ops import Projection, Sums, Transform, project_per_sample_grad_
from dataflex.ops.projection.hashing import (
    buckets,
    count_buckets,
    dense_signs,
    factor_signs,
    signs,
    sparse_buckets,
    tile_shape,
)
from tests.ops.by_hand import FORMULAS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRANSFORMS = ("sgd", "adam_less", "adam", "adam_fixed_v")


class Case(NamedTuple):
    """row [N, M], col [N, K], cu_seqlens [S + 1], and the fields of `Projection`, with ``scale``."""

    row: Tensor
    col: Tensor
    cu_seqlens: Tensor
    proj_dim: int
    options: dict[str, Any]


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    projections: tuple[str, ...] = ("xorfold", "countsketch", "sjlt"),
    dims: tuple[int, ...] = (4, 32, 64, 256, 512, 4096),
    largest: int = 150,
    unit: int = 1,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Case:
    """Odd sizes, ragged and empty segments, strided input, offsets; sizes and offsets are multiples of ``unit``."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    lengths = draw(st.lists(st.integers(0, 9) | st.integers(0, 70), min_size=1, max_size=5))
    m, k = (unit * draw(st.integers(1, 20 // unit + 1) | st.integers(1, largest // unit)) for _ in range(2))
    gap, tokens = unit * draw(st.integers(0, 2)), sum(lengths)
    dtype = draw(st.sampled_from(dtypes))
    row, col = (torch.randn(tokens, size + gap, generator=generator).to(dtype)[:, :size] for size in (m, k))
    if unit == 1 and draw(st.booleans()):
        row, col = row.T.contiguous().T, torch.randn(tokens, 2 * k, generator=generator).to(dtype)[:, ::2]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    options = {
        "transform": Transform(draw(st.sampled_from(TRANSFORMS)), 0.9, 0.99, 1e-4, 3),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "tensor_id": draw(st.integers(0, 2**32 - 1)),
        "exp_avg": 0.1 * torch.randn(m, k, generator=generator),
        "exp_avg_sq": torch.rand(m, k, generator=generator),
        "scale": 0.5 + torch.rand(len(lengths), generator=generator),
        "row_offset": unit * draw(st.integers(0, 90 // unit)),
        "col_offset": unit * draw(st.integers(0, 200 // unit)),
        "kind": draw(st.sampled_from(projections)),
        "directions": torch.randn(draw(st.integers(0, 6)), m, k, generator=generator),
    }
    return Case(row, col, bounds, draw(st.sampled_from(dims)), options)


class Results(NamedTuple):
    out: Tensor
    sqnorm: Tensor
    dots: Tensor


def project(case: Case, dtype: torch.dtype = torch.float32) -> Results:
    """All three outputs by the public function, in ``dtype`` throughout (float64: the reference)."""
    samples, queries = len(case.cu_seqlens) - 1, len(case.options["directions"])
    results = Results(*(torch.zeros(samples, *rest, dtype=dtype) for rest in ((case.proj_dim,), (), (queries,))))
    row, col, options = case.row, case.col, dict(case.options)
    if dtype is torch.float64:
        row, col = row.double(), col.double()
        options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    scale = options.pop("scale")
    project_per_sample_grad_(Sums(*results), row, col, case.cu_seqlens, Projection(**options), scale)
    return results


def error(got: Tensor, want: Tensor, size: float = 0.0) -> float:
    """Largest distance of a sample's row from the truth, relative to the largest one, or to ``size`` if more."""
    if not want.numel():
        return 0.0
    got, want = got.double().reshape(len(want), -1), want.reshape(len(want), -1)
    return float((got - want).norm(dim=1).max() / want.norm(dim=1).max().clamp(min=max(size, 1e-30)))


def dots_error(got: Tensor, want: Tensor, sqnorm: Tensor) -> float:
    """`error` relative to no less than their deviation over directions of variance 1: a single dot may be near 0."""
    return error(got, want, float(sqnorm.max()) ** 0.5)


def gradients(case: Case) -> Tensor:
    """[S, M, K] float64: each sample's transformed gradient, by the formulas."""
    o, t = case.options, case.options["transform"]
    bounds = case.cu_seqlens.tolist()
    out = []
    for s, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        g = float(o["scale"][s]) * case.row[a:b].double().T @ case.col[a:b].double()
        m, v = o["exp_avg"].double(), o["exp_avg_sq"].double()
        out.append(FORMULAS[t.kind](g, m, v, t.beta1, t.beta2, t.eps, t.step))
    return torch.stack(out)


def matrix_of(projection: str, rows: Tensor, columns: Tensor, tid: int, seed: int, proj_dim: int) -> Tensor:
    """The projection as a matrix, float64 [m, k, proj_dim]."""
    out = torch.zeros(len(rows), len(columns), proj_dim, dtype=torch.float64)
    where = (rows, columns, tid, seed)
    if projection == "rademacher":
        return dense_signs(*where, proj_dim).double() / proj_dim**0.5
    if projection == "kronecker":
        k1, k2 = tile_shape(proj_dim)
        left, right = factor_signs(rows, tid, seed, k1, True), factor_signs(columns, tid, seed, k2, False)
        return torch.einsum("mp,kq->mkpq", left.double(), right.double()).flatten(2) / proj_dim**0.5
    if projection == "xorfold":
        pairs = [(signs(*where), buckets(*where, proj_dim))]
    elif projection == "countsketch":
        pairs = [count_buckets(*where, proj_dim)]
    else:
        pairs = [(0.5 * sign, bucket) for sign, bucket in zip(*sparse_buckets(*where, proj_dim), strict=True)]
    for sign, bucket in pairs:
        out.scatter_add_(2, bucket[..., None], sign.double()[..., None])
    return out
