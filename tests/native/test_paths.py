"""Sizes on both sides of every condition in the native code, against float64: the ones that drawn cases miss."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from dataflex.ops import Transform, loss_and_head_sketch, per_sample_loss
from dataflex.ops.native import _ext
from tests.native.emulation import emulated
from tests.ops.loss_cases import Case as LossCase
from tests.ops.loss_cases import by_hand, within_budget
from tests.ops.project_cases import Case as ProjectCase
from tests.ops.project_cases import dots_error, error, gradients, matrix_of, project

PART = 16384  # columns of a part of a row (csrc/cpu/loss.cpp)
FEW = 32  # counted rows from which on rows are not split
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "smoothing of classes": {"label_smoothing": 0.2, "class_weight": True},
    "everything": {"label_smoothing": 0.1, "class_weight": True, "token_weight": True, "z_loss": 1e-3, "softcap": 8.0},
}


@pytest.fixture(autouse=True)
def native() -> None:
    if not isinstance(_ext.load("cpu"), _ext.Loaded):
        pytest.skip("no native CPU ops here")


def loss_case(rows: int, vocabulary: int, masked: int, dtype: torch.dtype, options: dict[str, Any]) -> LossCase:
    """Logits around 3, so that sums of them are not near 0; the label of row i is the last column, the first, ..."""
    draw = torch.Generator().manual_seed(rows + vocabulary)
    logits = (3 + 2 * torch.randn(rows, vocabulary, generator=draw)).to(dtype)
    edges = torch.tensor([vocabulary - 1, 0, min(PART, vocabulary - 1), min(PART, vocabulary) - 1, vocabulary // 2])
    labels = edges.repeat(-(-rows // 5))[:rows].clone()
    labels[rows - masked :] = -100
    weight = 0.5 + torch.rand(max(rows, vocabulary), generator=draw)
    given = dict(options)
    for name, size in (("class_weight", vocabulary), ("token_weight", rows)):
        if given.get(name):
            given[name] = weight[:size]
    return LossCase(logits, labels, torch.tensor([0, 2, rows]), given)


def check_loss(case: LossCase) -> None:
    exact, plain = by_hand(case), by_hand(case, case.logits.dtype)
    leaf = case.logits.clone().requires_grad_()
    result = per_sample_loss(leaf, case.labels, case.cu_seqlens, **case.options)
    result.loss.sum().backward()
    within_budget(result.loss, exact[0], plain[0])
    within_budget(leaf.grad, exact[1], plain[1])


def check_sketch(case: LossCase, k1: int) -> None:
    folded = {"k1": k1, "seed": 1, "tensor_id": 2}
    got = loss_and_head_sketch(case.logits, case.labels, case.cu_seqlens, **folded, **case.options)
    want = loss_and_head_sketch(case.logits.double(), case.labels, case.cu_seqlens, **folded, **case.options)
    torch.testing.assert_close(got.sketch.double(), want.sketch, rtol=2e-5, atol=3e-5)
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("rows", "masked"), [(FEW - 1, 0), (FEW, 0), (FEW + 1, 2), (3, 0)])
def test_rows_that_are_split_and_rows_that_are_not(rows: int, masked: int, options: str) -> None:
    """FEW + 1 rows of which 2 do not count: the forward splits them, the backward does not."""
    for vocabulary in (PART, PART + 1, 2 * PART + 65):
        check_loss(loss_case(rows, vocabulary, masked, torch.float32, OPTIONS[options]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_split_rows_in_half_precision(dtype: torch.dtype, options: str) -> None:
    check_loss(loss_case(4, PART + 33, 1, dtype, OPTIONS[options]))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("k1", [2, 64, 4096, PART, 2 * PART])
def test_sketches_of_split_rows(k1: int, options: str) -> None:
    """k1 shorter than a part, a part, and longer, where a part begins at whole folds."""
    for rows in (3, FEW):
        check_sketch(loss_case(rows, 2 * PART + 65, 1, torch.float32, OPTIONS[options]), k1)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_of_rows_in_parts(options: str, dtype: torch.dtype) -> None:
    """A part of a row has 2^14 bytes: one, two and several of them; sketches of one, two and four groups a thread."""
    part = (1 << 14) // dtype.itemsize
    with emulated():
        for vocabulary in (part - 8, 2 * part, 2 * part + 1):
            check_loss(loss_case(3, vocabulary, 1, dtype, OPTIONS[options]))
        for k1 in (2048, 4096, 8192):
            check_sketch(loss_case(2, part + 5, 0, dtype, OPTIONS[options]), k1)


def project_case(m: int, k: int, lengths: list[int], dim: int, projection: str = "xorfold") -> ProjectCase:
    draw = torch.Generator().manual_seed(m + k + dim)
    options = {
        "transform": Transform("adam", 0.9, 0.99, 1e-4, 3),
        "seed": 5,
        "tensor_id": 9,
        "exp_avg": 0.1 * torch.randn(m, k, generator=draw),
        "exp_avg_sq": torch.rand(m, k, generator=draw),
        "scale": 0.5 + torch.rand(len(lengths), generator=draw),
        "row_offset": 3,
        "col_offset": 100,
        "kind": projection,
        "directions": torch.randn(2, m, k, generator=draw),
    }
    tokens = sum(lengths)
    row, col = torch.randn(tokens, m, generator=draw), torch.randn(tokens, k, generator=draw)
    return ProjectCase(row, col, torch.tensor([0, *lengths]).cumsum(0), dim, options)


SHAPES = {
    "one group of tiles": (64, 128, [3, 2], 64),
    "the most groups of tiles": (64 * 9, 128 * 4 + 1, [2, 1], 256),
    "no column of a tile is exchanged with rows": (130, 15, [5, 0, 4], 512),
    "a token batch and one more": (9, 20, [256, 257, 255], 64),
    "no vector of a tile": (70, 140, [3, 4], 32),
    "more samples than partial sums hold": (64 * 9, 128 * 4 + 1, [1] * 5, 1 << 18),
    "more buckets than a block counts": (40, 50, [3, 1], 16384),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_projections_of_every_division_of_work(shape: str) -> None:
    m, k, lengths, dim = SHAPES[shape]
    case = project_case(m, k, lengths, dim)
    got = project(case)
    exact = gradients(case)
    if dim <= 16384 and m * k <= 10_000:
        where = torch.arange(m) + 3, torch.arange(k) + 100, 9, 5
        matrix = matrix_of("xorfold", *where, dim).flatten(0, 1)
        assert error(got.out, exact.flatten(1) @ matrix) < 1e-5
    assert error(got.out, project(case, torch.float64).out) < 1e-5
    assert error(got.sqnorm, exact.square().sum((1, 2))) < 1e-5
    dots = torch.einsum("smk,qmk->sq", exact, case.options["directions"].double())
    assert dots_error(got.dots, dots, got.sqnorm) < 1e-5


@pytest.mark.parametrize("k", [1, 8, 15, 16, 17])
def test_few_columns_that_begin_with_a_tile_are_exchanged_with_rows(k: int) -> None:
    case = project_case(130, k, [5, 0, 4], 512)
    case.options["col_offset"] = 256
    matrix = matrix_of("xorfold", torch.arange(130) + 3, torch.arange(k) + 256, 9, 5, 512).flatten(0, 1)
    assert error(project(case).out, gradients(case).flatten(1) @ matrix) < 1e-5


@pytest.mark.parametrize("projection", ["xorfold", "countsketch", "sjlt"])
def test_kernels_of_more_buckets_and_elements_than_a_group(projection: str) -> None:
    """2^15 elements in a group and 8192 buckets in a block: on both sides."""
    with emulated():
        for (m, k), dim in itertools.product([(16, 40), (130, 260)], (64, 16384)):
            case = project_case(m, k, [2, 1], dim, projection)
            got, want = project(case), project(case, torch.float64)
            assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 1e-5
