"""Every projection kind, exact scores and rows: against the projection as a matrix, and what must not matter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from dataflex.ops import Transform, project_dense_, project_per_sample_grad_, project_rows_, project_zero
from dataflex.ops.projection.project_kinds import PROJECTIONS
from tests.ops.project_cases import Case, cases, error, gradients, matrix_of, project

SGD: dict[str, Any] = {"transform": Transform(), "seed": 5, "tensor_id": 6}
ADAM = Transform("adam_less", 0.9, 0.99, 1e-4)


def positions(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = case.row.shape[1], case.col.shape[1]
    return torch.arange(m) + case.options["row_offset"], torch.arange(k) + case.options["col_offset"]


@settings(deadline=None, max_examples=30)
@given(cases(projections=PROJECTIONS[:4], dims=(4, 32, 256), largest=40))
def test_every_kind_is_its_matrix_times_the_transformed_gradient(case: Case) -> None:
    o = case.options
    truth = gradients(case)
    projection = matrix_of(o["projection"], *positions(case), o["tensor_id"], o["seed"], case.proj_dim)
    for dtype, budget in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        got = project(case, dtype)
        assert error(got.out, truth.flatten(1) @ projection.flatten(0, 1)) < budget
        assert error(got.sqnorm, (truth**2).sum((1, 2))) < budget
        assert error(got.dots, torch.einsum("smk,qmk->sq", truth, o["directions"].double())) < budget


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
        project_per_sample_grad_(out, row, col, cu, **SGD | {"seed": seed}, projection=projection)
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
        project_per_sample_grad_(out, r, c, bounds, **SGD, projection=projection, **more)
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
    sqnorm, dots = torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    more = {"sqnorm": sqnorm, "directions": directions, "dots": dots}
    assert project_per_sample_grad_(None, delta, inputs, torch.tensor(bounds), **SGD, **more) is None
    with_no_out = project_per_sample_grad_(
        None, delta.float(), inputs.float(), torch.tensor(bounds), **SGD, projection="rademacher", sqnorm=torch.zeros(3)
    )
    assert with_no_out is None
    torch.testing.assert_close(sqnorm, (truth**2).sum((1, 2)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dots, torch.einsum("smk,qmk->sq", truth, directions), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("projection", PROJECTIONS[:4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_and_vectors_give_the_same_three_outputs_as_the_matrix(projection: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(4)
    row_ids, values = torch.randint(0, 20, (12,), generator=draw), torch.randn(12, 150, generator=draw).to(dtype)
    cu, scale = torch.tensor([0, 5, 5, 12]), torch.tensor([0.5, 1.0, 2.0], dtype=dtype)
    moments = {"exp_avg": 0.1 * torch.randn(20, 150, generator=draw), "exp_avg_sq": torch.rand(20, 150, generator=draw)}
    how: dict[str, Any] = (
        SGD | {"transform": ADAM, "projection": projection} | {k: v.to(dtype) for k, v in moments.items()}
    )
    how |= {"directions": torch.randn(5, 20, 150, generator=draw).to(dtype), "row_offset": 3, "col_offset": 9}

    def outputs(samples: int) -> dict[str, torch.Tensor]:
        return {"sqnorm": torch.zeros(samples, dtype=dtype), "dots": torch.zeros(samples, 5, dtype=dtype)}

    want, wanted = torch.zeros(3, 64, dtype=dtype), outputs(3)
    one_hot = torch.nn.functional.one_hot(row_ids, 20).to(dtype)
    project_per_sample_grad_(want, one_hot, values, cu, scale=scale, **how, **wanted)
    nothing = {k: v.float() for k, v in outputs(1).items()}
    base = project_zero((20, 150), 64, **how, **nothing)
    got, measured = torch.zeros(3, 64, dtype=dtype), outputs(3)
    bases = {"base": base, "base_sqnorm": nothing["sqnorm"], "base_dots": nothing["dots"]}
    assert project_rows_(got, row_ids, values, cu, scale=scale, **how, **measured, **bases) is got
    for one, other in ((got, want), (measured["sqnorm"], wanted["sqnorm"]), (measured["dots"], wanted["dots"])):
        assert error(one, other.double()) < 1e-5

    vector = {k: v[0] for k, v in how.items() if k in moments} | {"directions": how["directions"][:, 0]}
    dense: dict[str, Any] = {k: v for k, v in how.items() if k != "row_offset"} | vector
    got, measured = torch.zeros(12, 64, dtype=dtype), outputs(12)
    project_dense_(got, values, **dense, **measured)
    want, wanted = torch.zeros(12, 64, dtype=dtype), outputs(12)
    matrix = {k: v[None] for k, v in vector.items() if k in moments} | {"directions": vector["directions"][:, None]}
    ones = torch.ones(12, 1, dtype=dtype)
    project_per_sample_grad_(want, ones, values, torch.arange(13), **dense | matrix, **wanted)
    for one, other in ((got, want), (measured["sqnorm"], wanted["sqnorm"]), (measured["dots"], wanted["dots"])):
        assert error(one, other.double()) < 1e-5


ROW, COL, CU = torch.zeros(4, 3), torch.zeros(4, 5), torch.tensor([0, 2, 4])
OUT, NORM = torch.zeros(2, 64), torch.zeros(2)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"projection": "xorfolds"}, "projection: expected one of xorfold, countsketch, .*, got 'xorfolds'"),
        ({"out": torch.zeros(2, 6), "projection": "sjlt"}, "proj_dim: sjlt expects a multiple of 4, got 6"),
        ({"projection": "kronecker", "transform": ADAM}, "'kronecker' expects transform 'sgd', got 'adam_less'"),
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
    arguments = {"out": OUT, "row": ROW, "col": COL, "cu_seqlens": CU} | SGD | more
    with pytest.raises(ValueError, match=text):
        project_per_sample_grad_(**arguments)


def test_row_ids_out_of_range_are_refused() -> None:
    moments = {"exp_avg": torch.zeros(5, 5), "exp_avg_sq": torch.zeros(5, 5)}
    for bad in (-1, 5):
        ids = torch.tensor([0, bad, 0, 0])
        with pytest.raises(ValueError, match=f"row_ids: expected 0 to 5 - 1, got {bad}"):
            project_rows_(OUT.clone(), ids, COL, CU, **SGD | {"transform": ADAM}, **moments)
