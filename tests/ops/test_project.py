"""Projected per-sample gradients: an explicit fold in float64, and what must not change a feature."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dataflex.ops import (
    Projection,
    Sums,
    Transform,
    project_dense_,
    project_per_sample_grad_,
    project_rows_,
    project_zero,
)
from dataflex.ops.projection import project_reference as implementation
from dataflex.ops.projection.hashing import buckets, signs, tile_shape
from tests.ops.by_hand import FORMULAS

M, K = 37, 70
KINDS = ("sgd", "adam_less", "adam", "adam_fixed_v")
RAGGED = [0, 3, 3, 4, 11, 16]


def tokens(bounds: list[int], m: int = M, k: int = K, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Any]:
    """row [N, m], col [N, k] and cu_seqlens of the segments in ``bounds``."""
    draw = torch.Generator().manual_seed(bounds[-1])
    row = torch.randn(bounds[-1], m, generator=draw, dtype=torch.float64)
    col = torch.randn(bounds[-1], k, generator=draw, dtype=torch.float64)
    return row.to(dtype), col.to(dtype), torch.tensor(bounds)


def how(kind: str, m: int = M, k: int = K) -> dict[str, Any]:
    """Fields of a projection with the transform ``kind`` and moments [m, k]."""
    draw = torch.Generator().manual_seed(1)
    first = 0.1 * torch.randn(m, k, generator=draw, dtype=torch.float64)
    second = torch.rand(m, k, generator=draw, dtype=torch.float64)
    return {
        "transform": Transform(kind, 0.9, 0.99, 1e-4, 3),
        "seed": 77,
        "tensor_id": 123,
        "exp_avg": first,
        "exp_avg_sq": second,
    }


def fold(matrix: torch.Tensor, proj_dim: int, arguments: dict[str, Any], at: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """The projection of one matrix, element by element."""
    rows, columns = torch.arange(matrix.shape[0]) + at[0], torch.arange(matrix.shape[1]) + at[1]
    sign = signs(rows, columns, arguments["tensor_id"], arguments["seed"])
    place = buckets(rows, columns, arguments["tensor_id"], arguments["seed"], proj_dim)
    out = torch.zeros(proj_dim, dtype=torch.float64)
    for r in range(matrix.shape[0]):
        for c in range(matrix.shape[1]):
            out[place[r, c]] += sign[r, c] * matrix[r, c]
    return out


def projected(
    row: Any, col: Any, cu: Any, proj_dim: int = 64, dtype: Any = torch.float64, scale: Any = 1.0, **of: Any
) -> Any:
    sums = Sums.zeros(len(cu) - 1, proj_dim, dtype=dtype)
    assert project_per_sample_grad_(sums, row, col, cu, Projection(**of), scale) is sums
    return sums.out


def transformed(gradient: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """The transform written out, independently of `Transform`."""
    t = arguments["transform"]
    formula = FORMULAS[t.kind]
    return formula(gradient, arguments["exp_avg"], arguments["exp_avg_sq"], t.beta1, t.beta2, t.eps, t.step)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", [RAGGED, [0, 4, 8, 12], [0, 5], [0, 0]])
def test_equals_the_fold_of_each_samples_gradient(kind: str, bounds: list[int]) -> None:
    row, col, cu = tokens(bounds)
    arguments = how(kind)
    got = projected(row, col, cu, scale=0.25, **arguments)
    for s, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        gradient = 0.25 * row[a:b].T @ col[a:b]
        want = fold(transformed(gradient, arguments), 64, arguments)
        torch.testing.assert_close(got[s], want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("m", "k"), [(1, 1), (1, 300), (129, 2), (64, 128)])
def test_odd_shapes(m: int, k: int) -> None:
    row, col, cu = tokens([0, 2, 5], m, k)
    arguments = how("adam_less", m, k)
    got = projected(row, col, cu, proj_dim=512, **arguments)
    for s, (a, b) in enumerate(((0, 2), (2, 5))):
        want = fold(transformed(row[a:b].T @ col[a:b], arguments), 512, arguments)
        torch.testing.assert_close(got[s], want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_of_any_float_dtype_are_summed_in_the_dtype_of_out(dtype: torch.dtype) -> None:
    row, col, cu = tokens(RAGGED, dtype=dtype)
    arguments = how("adam_less")
    got = projected(row, col, cu, dtype=torch.float32, **arguments)
    want = projected(row.double(), col.double(), cu, **arguments)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_does_not_depend_on_the_batch(kind: str) -> None:
    """A sample alone, in another order, or with zero tokens after it (padding) has the same feature."""
    row, col, cu = tokens(RAGGED)
    arguments = how(kind)
    together = projected(row, col, cu, **arguments)
    for s, (a, b) in enumerate(zip(RAGGED[:-1], RAGGED[1:], strict=True)):
        alone = projected(row[a:b], col[a:b], torch.tensor([0, b - a]), **arguments)
        padding = torch.zeros(5, M, dtype=torch.float64), torch.ones(5, K, dtype=torch.float64)
        padded = projected(
            torch.cat([row[a:b], padding[0]]),
            torch.cat([col[a:b], padding[1]]),
            torch.tensor([0, b - a + 5]),
            **arguments,
        )
        torch.testing.assert_close(alone[0], together[s], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(padded[0], together[s], rtol=1e-12, atol=1e-13)
    backwards = [range(a, b) for a, b in zip(RAGGED[:-1], RAGGED[1:], strict=True)][::-1]
    order = [t for part in backwards for t in part]
    bounds = torch.tensor([0, *torch.tensor([len(p) for p in backwards]).cumsum(0).tolist()])
    turned = projected(row[order], col[order], bounds, **arguments)
    torch.testing.assert_close(turned.flip(0), together, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 8, 30])
def test_adds_up_over_shards_of_rows_and_of_columns(kind: str, cut: int) -> None:
    row, col, cu = tokens(RAGGED)
    arguments = how(kind)
    whole = projected(row, col, cu, **arguments)
    out = torch.zeros_like(whole)
    moments = arguments.pop("exp_avg"), arguments.pop("exp_avg_sq")
    for rows in (slice(0, cut), slice(cut, M)):
        for columns in (slice(0, 2 * cut), slice(2 * cut, K)):
            m, v = (moment[rows, columns] for moment in moments)
            of = Projection(exp_avg=m, exp_avg_sq=v, row_offset=rows.start, col_offset=columns.start, **arguments)
            project_per_sample_grad_(Sums(out), row[:, rows], col[:, columns], cu, of)
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)


def test_accumulates_into_out_and_over_layers() -> None:
    row, col, cu = tokens(RAGGED)
    arguments = how("sgd")
    first = projected(row, col, cu, **arguments)
    second = projected(row, col, cu, **(arguments | {"tensor_id": 124}))
    out = first.clone()
    project_per_sample_grad_(Sums(out), row, col, cu, Projection(**(arguments | {"tensor_id": 124})))
    torch.testing.assert_close(out, first + second)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 5_000, 20_000])
def test_chunks_of_rows_change_nothing(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    row, col, cu = tokens(RAGGED)
    whole = projected(row, col, cu, **how(kind))
    calls = []
    inner = implementation.outer_sums
    monkeypatch.setattr(implementation, "_CHUNK_BYTES", chunk)
    monkeypatch.setattr(implementation, "_SMALLEST_CHUNK", 4)
    monkeypatch.setattr(implementation, "outer_sums", lambda r, c, b: calls.append(r.shape[1]) or inner(r, c, b))
    torch.testing.assert_close(projected(row, col, cu, **how(kind)), whole, rtol=1e-12, atol=1e-12)
    assert len(calls) > 1 and sum(calls) == M


@pytest.mark.parametrize("proj_dim", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_inner_products_are_unbiased_with_the_predicted_variance(proj_dim: int) -> None:
    """Elements of one tile never collide, others do with probability 1/d: the formula of design section 6
    less its pairs inside tiles."""
    tile_rows, tile_columns = tile_shape(proj_dim)
    m, k, seeds = 4 * tile_rows, 4 * tile_columns, 1200
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, m, k, generator=draw, dtype=torch.float64)
    b += 0.5 * a
    eye = torch.eye(m, dtype=torch.float64)
    row, col, cu = torch.cat([eye, eye]), torch.cat([a, b]), torch.tensor([0, m, 2 * m])
    products = []
    for seed in range(seeds):
        out = torch.zeros(2, proj_dim, dtype=torch.float64)
        project_per_sample_grad_(Sums(out), row, col, cu, Projection(8, seed))
        products.append(out[0] @ out[1])
    got = torch.stack(products)
    tiles = [t.unfold(0, tile_rows, tile_rows).unfold(1, tile_columns, tile_columns) for t in (a, b)]
    squares = (tiles[0] ** 2).sum((2, 3)) * (tiles[1] ** 2).sum((2, 3))
    inside = (squares + (tiles[0] * tiles[1]).sum((2, 3)) ** 2).sum()
    variance = float(((a**2).sum() * (b**2).sum() + (a * b).sum() ** 2 - inside) / proj_dim)
    assert abs(float(got.mean() - (a * b).sum())) < 4 * (variance / seeds) ** 0.5
    assert float(got.var()) == pytest.approx(variance, rel=0.2)


def test_without_collisions_inner_products_are_exact() -> None:
    row, col, cu = tokens([0, 3, 7], 4, 8)
    out = projected(row, col, cu, proj_dim=32, **how("sgd", 4, 8))
    gradients = torch.stack([row[:3].T @ col[:3], row[3:].T @ col[3:]]).flatten(1)
    torch.testing.assert_close(out @ out.T, gradients @ gradients.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_vectors_are_row_zero_of_their_tensor(kind: str) -> None:
    draw = torch.Generator().manual_seed(3)
    gradient = torch.randn(4, K, generator=draw, dtype=torch.float64)
    arguments = how(kind, 1, K)
    vectors = arguments | {n: arguments[n][0] for n in ("exp_avg", "exp_avg_sq")}
    sums = Sums.zeros(4, 64, dtype=torch.float64)
    assert project_dense_(sums, gradient, Projection(**vectors)) is sums and sums.out is not None
    for s in range(4):
        want = fold(transformed(gradient[s : s + 1], arguments), 64, arguments)
        torch.testing.assert_close(sums.out[s], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_the_dense_projection_of_the_scattered_matrix(kind: str) -> None:
    """An embedding: tokens repeat in a sample, a sample is empty, most rows are not touched."""
    draw = torch.Generator().manual_seed(4)
    row_ids = torch.randint(0, M, (RAGGED[-1],), generator=draw)
    row_ids[1] = row_ids[0]
    values = torch.randn(RAGGED[-1], K, generator=draw, dtype=torch.float64)
    arguments, cu = how(kind), torch.tensor(RAGGED)
    out = torch.zeros(len(RAGGED) - 1, 64, dtype=torch.float64)
    of = Projection(**arguments)
    base = project_zero(Sums.zeros(1, 64, dtype=torch.float64), (M, K), of)
    project_rows_(Sums(out), row_ids, values, cu, of, 2.0, base)
    scattered = torch.nn.functional.one_hot(row_ids, M).double()
    want = projected(scattered, values, cu, scale=2.0, **arguments)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-4)
    if kind == "sgd":
        assert base.out is not None and not base.out.any() and not out[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_project_zero_is_the_feature_of_a_sample_without_gradient(kind: str) -> None:
    arguments = how(kind)
    want = fold(transformed(torch.zeros(M, K, dtype=torch.float64), arguments), 64, arguments)
    for dtype, room in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        sums = project_zero(Sums.zeros(1, 64, dtype=dtype), (M, K), Projection(**arguments))
        assert sums.out is not None
        torch.testing.assert_close(sums.out[0].double(), want, rtol=room, atol=room)


ROW, COL, CU = tokens([0, 2, 4])
OUT = torch.zeros(2, 64)
SGD = Projection(tensor_id=2, seed=1)
ADAM = Projection(tensor_id=2, seed=1, transform=Transform("adam_less"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((OUT.half(), ROW, COL, CU), r"out: expected float32 \[S, proj_dim\], got torch.float16 \(2, 64\)"),
        ((OUT[0], ROW, COL, CU), r"out: expected float32 \[S, proj_dim\], got torch.float32 \(64,\)"),
        ((OUT, ROW[:3], COL, CU), r"expected \[N, M\] and \[N, K\], got \(3, 37\) and \(4, 70\)"),
        ((OUT, ROW, COL, CU[:2]), r"cu_seqlens: expected int64 \[3\], got torch.int64 \(2,\)"),
        ((OUT, ROW, COL, CU.int()), r"cu_seqlens: expected int64 \[3\], got torch.int32 \(3,\)"),
        ((OUT, ROW, COL, torch.tensor([0, 2, 3])), r"cu_seqlens: expected to rise from 0 to 4, got \[0, 2, 3\]"),
        ((OUT, ROW, COL, torch.tensor([0, 5, 4])), r"cu_seqlens: expected to rise from 0 to 4, got \[0, 5, 4\]"),
        ((torch.zeros(2, 65), ROW, COL, CU), r"proj_dim: expected a power of two >= 2, got 65"),
    ],
)
def test_error_texts(arguments: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        project_per_sample_grad_(Sums(arguments[0]), *arguments[1:], SGD)


def test_missing_or_misshapen_moments_are_refused() -> None:
    moments = torch.zeros(M, K)
    with pytest.raises(ValueError, match=r"exp_avg: transform 'adam_less' expects \[37, 70\], got None"):
        project_per_sample_grad_(Sums(OUT.clone()), ROW, COL, CU, ADAM)
    with pytest.raises(ValueError, match=r"exp_avg_sq: transform 'adam_less' expects \[37, 70\], got \(70, 37\)"):
        of = replace(ADAM, exp_avg=moments, exp_avg_sq=moments.T)
        project_per_sample_grad_(Sums(OUT.clone()), ROW, COL, CU, of)
    with pytest.raises(ValueError, match=r"grad: expected \[2, K\], got \(3, 5\)"):
        project_dense_(Sums(OUT.clone()), torch.zeros(3, 5), SGD)
    with pytest.raises(ValueError, match=r"exp_avg: transform 'adam_less' expects \[5\], got None"):
        project_dense_(Sums(OUT.clone()), torch.zeros(2, 5), ADAM)
    with pytest.raises(ValueError, match=r"row_ids: expected int64 \[4\], got torch.int64 \(3,\)"):
        project_rows_(Sums(OUT.clone()), torch.zeros(3, dtype=torch.int64), COL, CU, SGD)
    with pytest.raises(ValueError, match=r"exp_avg: transform 'adam_less' expects \[M, 70\], got None"):
        project_rows_(Sums(OUT.clone()), torch.zeros(4, dtype=torch.int64), COL, CU, ADAM)
