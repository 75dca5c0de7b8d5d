"""Every projection kind, exact scores and rows: against the projection as a matrix, and what must not matter."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from dataflex.ops import (
    Projection,
    Sums,
    Transform,
    project_dense_,
    project_per_sample_grad_,
    project_rows_,
    project_zero,
)
from dataflex.ops.projection.project_kinds import PROJECTIONS
from tests.ops.project_cases import Case, cases, dots_error, error, gradients, matrix_of, project

SGD: dict[str, Any] = {"seed": 5, "tensor_id": 6}
ADAM = Transform("adam_less", 0.9, 0.99, 1e-4)


def positions(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = case.row.shape[1], case.col.shape[1]
    return torch.arange(m) + case.options["row_offset"], torch.arange(k) + case.options["col_offset"]


@settings(deadline=None, max_examples=30)
@given(cases(projections=PROJECTIONS[:4], dims=(4, 32, 256), largest=40))
def test_every_kind_is_its_matrix_times_the_transformed_gradient(case: Case) -> None:
    o = case.options
    truth = gradients(case)
    projection = matrix_of(o["kind"], *positions(case), o["tensor_id"], o["seed"], case.proj_dim)
    for dtype, budget in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        got = project(case, dtype)
        assert error(got.out, truth.flatten(1) @ projection.flatten(0, 1)) < budget
        assert error(got.sqnorm, (truth**2).sum((1, 2))) < budget
        dots = torch.einsum("smk,qmk->sq", truth, o["directions"].double())
        assert dots_error(got.dots, dots, got.sqnorm) < budget


@settings(deadline=None, max_examples=10)
@given(cases(projections=("kronecker",), dims=(4, 32, 256), largest=40))
def test_kronecker_is_its_matrix_times_the_gradient(case: Case) -> None:
    case.options["transform"] = Transform()
    o = case.options
    projection = matrix_of("kronecker", *positions(case), o["tensor_id"], o["seed"], case.proj_dim)
    got = project(case, torch.float64)
    assert error(got.out, gradients(case).flatten(1) @ projection.flatten(0, 1)) < 1e-10
    assert error(got.sqnorm, (gradients(case) ** 2).sum((1, 2))) < 1e-10


@pytest.mark.parametrize("projection", PROJECTIONS[1:])
def test_inner_products_are_unbiased_with_the_predicted_variance(projection: str) -> None:
    """Mean and variance over 2000 seeds: five standard errors each, so a false alarm in 10^6 at most.

    Any two elements collide with probability 1 / proj_dim times the number of common buckets, none of them with
    itself: variance (|a|^2 |b|^2 + <a, b>^2 - 2 sum a^2 b^2) / proj_dim. Kronecker signs of a row are shared by its
    columns, which adds to it: only the mean is tried there.
    """
    seeds, proj_dim = 2000, 16
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 6, 9, generator=draw, dtype=torch.float64)
    b += a
    eye = torch.eye(6, dtype=torch.float64)
    row, col, cu = torch.cat([eye, eye]), torch.cat([a, b]), torch.tensor([0, 6, 12])
    products = []
    for seed in range(seeds):
        out = torch.zeros(2, proj_dim, dtype=torch.float64)
        project_per_sample_grad_(Sums(out), row, col, cu, Projection(6, seed, kind=projection))
        products.append(out[0] @ out[1])
    got = torch.stack(products)
    deviation = got - (a * b).sum()
    assert abs(float(deviation.mean())) < 5 * float(got.std()) / seeds**0.5
    if projection != "kronecker":
        variance = float((a**2).sum() * (b**2).sum() + (a * b).sum() ** 2 - 2 * (a * a * b * b).sum()) / proj_dim
        noise = float((deviation**2).std()) / math.sqrt(seeds)
        assert abs(float((deviation**2).mean()) - variance) < 5 * noise


@settings(deadline=None, max_examples=20)
@given(cases(projections=PROJECTIONS[:4], dims=(32, 256), largest=40))
def test_a_feature_belongs_to_its_sample_alone(case: Case) -> None:
    """A sample alone, in the reverse order, or with zero tokens after it has the same feature."""
    together = project(case)
    bounds = case.cu_seqlens.tolist()
    parts = list(zip(bounds[:-1], bounds[1:], strict=True))
    for s, (a, b) in enumerate(parts):
        alone = project(one_sample(case, s, case.row[a:b], case.col[a:b]))
        zeros = case.row.new_zeros(3, case.row.shape[1])
        padded = one_sample(
            case,
            s,
            torch.cat([case.row[a:b], zeros]),
            torch.cat([case.col[a:b], case.col[:3].new_ones(3, case.col.shape[1])]),
        )
        for again in (alone, project(padded)):
            torch.testing.assert_close(
                again.out[0], together.out[s], rtol=1e-5, atol=1e-5 * float(together.out.abs().max())
            )
            torch.testing.assert_close(again.dots[0], together.dots[s], rtol=1e-4, atol=1e-3)
    order = [t for a, b in reversed(parts) for t in range(a, b)]
    lengths = torch.tensor([0, *(b - a for a, b in reversed(parts))])
    options = case.options | {"scale": case.options["scale"].flip(0)}
    turned = project(Case(case.row[order], case.col[order], lengths.cumsum(0), case.proj_dim, options))
    torch.testing.assert_close(turned.out.flip(0), together.out, rtol=1e-5, atol=1e-5 * float(together.out.abs().max()))


def one_sample(case: Case, s: int, row: torch.Tensor, col: torch.Tensor) -> Case:
    options = case.options | {"scale": case.options["scale"][s : s + 1]}
    return Case(row, col, torch.tensor([0, len(row)]), case.proj_dim, options)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_linear_transforms_add_over_tokens_and_all_add_over_shards(projection: str) -> None:
    draw = torch.Generator().manual_seed(2)
    row, col = torch.randn(9, 30, generator=draw), torch.randn(9, 140, generator=draw)
    cu = torch.tensor([0, 4, 9])

    def features(r: Any, c: Any, bounds: Any, **more: Any) -> torch.Tensor:
        out = torch.zeros(len(bounds) - 1, 64)
        project_per_sample_grad_(Sums(out), r, c, bounds, Projection(**SGD, kind=projection, **more))
        return out

    whole = features(row, col, cu)
    by_token = features(row, col, torch.arange(10))
    torch.testing.assert_close(torch.stack([by_token[:4].sum(0), by_token[4:].sum(0)]), whole, rtol=1e-4, atol=1e-4)
    shards = sum(
        features(row[:, i:j], col[:, k:n], cu, row_offset=i, col_offset=k)
        for i, j in ((0, 7), (7, 30))
        for k, n in ((0, 61), (61, 140))
    )
    torch.testing.assert_close(shards, whole, rtol=1e-4, atol=1e-4)


def test_exact_scores_are_the_inner_products_with_autograds_gradients() -> None:
    """A linear layer in float64: squared norms and inner products of per-sample gradients, without a projection."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 7, generator=draw, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(10, 7, generator=draw, dtype=torch.float64)
    directions = torch.randn(3, 5, 7, generator=draw, dtype=torch.float64)
    bounds = [0, 3, 3, 10]
    outputs = inputs @ weight.T
    losses = torch.stack([(outputs[a:b] ** 3).sum() for a, b in zip(bounds[:-1], bounds[1:], strict=True)])
    truth = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses])
    delta = torch.autograd.grad(losses.sum(), outputs)[0]
    sums, cu = Sums.zeros(3, 0, 3, dtype=torch.float64), torch.tensor(bounds)
    project_per_sample_grad_(sums, delta, inputs, cu, Projection(**SGD, directions=directions))
    assert sums.out is None and sums.sqnorm is not None and sums.dots is not None
    torch.testing.assert_close(sums.sqnorm, (truth**2).sum((1, 2)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums.dots, torch.einsum("smk,qmk->sq", truth, directions), rtol=1e-12, atol=1e-12)
    norms = Sums.zeros(3, 0, dtype=torch.float32)
    project_per_sample_grad_(norms, delta.float(), inputs.float(), cu, Projection(**SGD, kind="rademacher"))
    assert norms.sqnorm is not None and error(norms.sqnorm, sums.sqnorm) < 1e-5


@pytest.mark.parametrize("projection", PROJECTIONS[:4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_and_vectors_give_the_same_three_outputs_as_the_matrix(projection: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(4)
    row_ids, values = torch.randint(0, 20, (12,), generator=draw), torch.randn(12, 150, generator=draw).to(dtype)
    cu, scale = torch.tensor([0, 5, 5, 12]), torch.tensor([0.5, 1.0, 2.0], dtype=dtype)
    moments = {"exp_avg": 0.1 * torch.randn(20, 150, generator=draw), "exp_avg_sq": torch.rand(20, 150, generator=draw)}
    of = Projection(
        **SGD,
        **{name: moment.to(dtype) for name, moment in moments.items()},
        transform=ADAM,
        kind=projection,
        directions=torch.randn(5, 20, 150, generator=draw).to(dtype),
        row_offset=3,
        col_offset=9,
    )

    def sums(samples: int) -> Sums:
        shapes = (64,), (), (5,)
        return Sums(*(torch.zeros(samples, *shape, dtype=dtype) for shape in shapes))

    def equal(got: Sums, want: Sums) -> None:
        for one, other in zip(got.tensors, want.tensors, strict=True):
            assert one is not None and other is not None and error(one, other.double()) < 1e-5

    one_hot = torch.nn.functional.one_hot(row_ids, 20).to(dtype)
    base = project_zero(sums(1), (20, 150), of)
    got = project_rows_(sums(3), row_ids, values, cu, of, scale, base)
    equal(got, project_per_sample_grad_(sums(3), one_hot, values, cu, of, scale))

    first = replace(of.rows(slice(0, 1)), row_offset=0)
    m, v, toward = (None if t is None else t.squeeze(-2) for t in (first.exp_avg, first.exp_avg_sq, first.directions))
    got = project_dense_(sums(12), values, replace(first, exp_avg=m, exp_avg_sq=v, directions=toward))
    ones = torch.ones(12, 1, dtype=dtype)
    equal(got, project_per_sample_grad_(sums(12), ones, values, torch.arange(13), first))


ROW, COL, CU = torch.zeros(4, 3), torch.zeros(4, 5), torch.tensor([0, 2, 4])
OUT, NORM = torch.zeros(2, 64), torch.zeros(2)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"kind": "xorfolds"}, "projection: expected one of xorfold, countsketch, .*, got 'xorfolds'"),
        ({"out": torch.zeros(2, 6), "kind": "sjlt"}, "proj_dim: sjlt expects a multiple of 4, got 6"),
        ({"kind": "kronecker", "transform": ADAM}, "'kronecker' expects transform 'sgd', got 'adam_less'"),
        ({"seed": -1}, r"seed: expected 0 to \d+, got -1"),
        ({"tensor_id": 1 << 32}, "tensor_id: expected 0 to 4294967295, got 4294967296"),
        ({"row_offset": -8}, r"row_offset: expected 0 to \d+, got -8"),
        ({"scale": torch.ones(3)}, r"scale: expected a number or \[2\] on cpu, got \(3,\) on cpu"),
        ({"sqnorm": torch.zeros(3)}, r"sqnorm: expected torch.float32 \[2\], got torch.float32 \(3,\)"),
        ({"sqnorm": NORM.double()}, r"sqnorm: expected torch.float32 \[2\], got torch.float64 \(2,\)"),
        ({"dots": torch.zeros(2, 1)}, "directions, dots: expected both or neither"),
        (
            {"dots": torch.zeros(2, 1), "directions": torch.zeros(1, 5, 3)},
            r"directions: expected \[Q, 3, 5\], got \(1, 5, 3\)",
        ),
        ({"out": torch.zeros(64, 2).T}, r"out: expected a contiguous tensor, got strides \(1, 2\)"),
        ({"out": None}, "out: expected a tensor, or sqnorm or dots, got none of them"),
        ({"row": ROW.long()}, "row: expected a floating point tensor, got torch.int64"),
    ],
)
def test_error_texts(more: dict[str, Any], text: str) -> None:
    tokens = {"row": ROW, "col": COL, "cu_seqlens": CU, "scale": 1.0} | more
    given = {"out": OUT} | SGD | more
    sums = Sums(*(given.get(name) for name in ("out", "sqnorm", "dots")))
    of = Projection(**{field.name: given[field.name] for field in fields(Projection) if field.name in given})
    with pytest.raises(ValueError, match=text):
        project_per_sample_grad_(sums, tokens["row"], tokens["col"], tokens["cu_seqlens"], of, tokens["scale"])


def test_row_ids_out_of_range_are_refused() -> None:
    moments = {"exp_avg": torch.zeros(5, 5), "exp_avg_sq": torch.zeros(5, 5)}
    for bad in (-1, 5):
        ids = torch.tensor([0, bad, 0, 0])
        with pytest.raises(ValueError, match=f"row_ids: expected 0 to 5 - 1, got {bad}"):
            project_rows_(Sums(OUT.clone()), ids, COL, CU, Projection(**SGD, transform=ADAM, **moments))
