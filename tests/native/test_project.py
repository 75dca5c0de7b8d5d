"""The native projections against float64: every instruction set of the CPU, and the CUDA kernels under emulation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from dataflex.ops import Projection, Sums, Transform, project_per_sample_grad_, project_rows_
from dataflex.ops.native import _ext
from dataflex.ops.projection import project_native
from dataflex.ops.projection import project_reference as reference
from tests.native.emulation import ORDERS, emulated
from tests.ops.project_cases import Case, cases, dots_error, error, project

ROOT = Path(__file__).resolve().parents[2]
HALVES = (torch.bfloat16, torch.float16)
# Sums of a few thousand products in float32; the same for every implementation.
BUDGET = 1e-5


def compare(case: Case, got: Any) -> None:
    want = project(case, torch.float64)
    assert error(got.out, want.out) < BUDGET
    assert error(got.sqnorm, want.sqnorm) < BUDGET
    assert dots_error(got.dots, want.dots, want.sqnorm) < BUDGET


@pytest.fixture
def native_cpu() -> Any:
    if isinstance(result := _ext.load("cpu"), _ext.Unavailable):
        pytest.skip(result.reason)
    return torch.ops.dataflex


@settings(deadline=None, max_examples=60)
@given(cases(largest=300))
def test_cpu_equals_float64_and_is_the_same_bits_twice_and_by_any_number_of_threads(case: Case) -> None:
    if isinstance(_ext.load("cpu"), _ext.Unavailable):
        pytest.skip("no native CPU ops")
    threads = torch.get_num_threads()
    got = project(case)
    compare(case, got)
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        again = project(case)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_cpu_bits_of_a_sample_do_not_depend_on_its_batch(native_cpu: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    row, col = torch.randn(600, 300, generator=draw), torch.randn(600, 270, generator=draw)
    of = Projection(tensor_id=4, seed=3)

    def features(a: int, b: int, *bounds: int) -> torch.Tensor:
        out = torch.zeros(len(bounds) - 1, 4096)
        project_per_sample_grad_(Sums(out), row[a:b], col[a:b], torch.tensor(bounds), of)
        return out

    together = features(0, 600, 0, 5, 305, 600)
    for s, (a, b) in enumerate(((0, 5), (5, 305), (305, 600))):
        assert torch.equal(features(a, b, 0, b - a)[0], together[s])


INSTRUCTIONS = """
import torch
from dataflex.ops.native import _ext
from tests.native.test_project import compare, fixed_cases
from tests.ops.project_cases import project
assert isinstance(_ext.load("cpu"), _ext.Loaded)
for case in fixed_cases():
    compare(case, project(case))
print("equal")
"""


def fixed_cases() -> list[Case]:
    """Sizes around the edges of strips, segments and tiles, for each kind and transform."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for i, (m, k) in enumerate([(1, 1), (8, 300), (300, 8), (65, 129), (33, 17), (130, 260)]):
        for j, projection in enumerate(("xorfold", "countsketch", "sjlt")):
            for proj_dim in (16, 64, 512, 8192):
                bounds = torch.tensor([0, 3, 3, 40, 340])
                kind = ("sgd", "adam_less", "adam", "adam_fixed_v")[(i + j) % 4]
                dtype = (torch.float32, *HALVES)[(i + proj_dim // 64) % 3]
                options = {
                    "transform": Transform(kind, 0.9, 0.99, 1e-4, 3),
                    "seed": 2**62 + i,
                    "tensor_id": 2**31 + j,
                    "exp_avg": 0.1 * torch.randn(m, k, generator=draw),
                    "exp_avg_sq": torch.rand(m, k, generator=draw),
                    "scale": 0.5 + torch.rand(4, generator=draw),
                    "row_offset": 13 * i,
                    "col_offset": 37 * i,
                    "kind": projection,
                    "directions": torch.randn(j, m, k, generator=draw),
                }
                row, col = torch.randn(340, m, generator=draw), torch.randn(340, k, generator=draw)
                made.append(Case(row.to(dtype), col.to(dtype), bounds, proj_dim, options))
    return made


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_equals_float64(isa: str, native_cpu: Any) -> None:
    environment = os.environ | {"DATAFLEX_ISA": isa, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", INSTRUCTIONS]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize("order", ORDERS)
def test_emulated_epilogue_equals_float64(order: tuple[str, int]) -> None:
    @settings(deadline=None, max_examples=12)
    @given(cases(dims=(4, 64, 256, 4096), largest=60, dtypes=(torch.float32,)))
    def run(case: Case) -> None:
        with emulated(*order):
            compare(case, project(case))

    run()


@pytest.mark.parametrize("order", ORDERS)
def test_emulated_fused_kernel_equals_float64(order: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project_native, "chunked", no_chunks)

    @settings(deadline=None, max_examples=8)
    @given(cases(projections=("xorfold",), dims=(512, 2048, 8192, 16384), largest=180, unit=8, dtypes=HALVES))
    def run(case: Case) -> None:
        with emulated(*order):
            compare(case, project(case))

    run()


def no_chunks(*_: Any) -> None:
    raise AssertionError("these arguments are for the fused kernel")


@pytest.mark.parametrize("kib", [48, 99, 163])
def test_a_device_with_less_shared_memory_runs_another_form(kib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """sm_86, sm_89 and sm_120 have 99 KiB a block, where the fused kernel needs more for 16384 outputs."""
    draw = torch.Generator().manual_seed(1)
    row, col = (torch.randn(40, n, generator=draw).to(torch.bfloat16) for n in (16, 24))
    went: list[int] = []
    chunked = project_native.chunked
    monkeypatch.setattr(project_native, "chunked", lambda ops, out, *rest: (went.append(1), chunked(ops, out, *rest)))
    for projection, dim in (("xorfold", 16384), ("xorfold", 512), ("countsketch", 12000), ("sjlt", 16384)):
        options = {
            "transform": Transform(), "seed": 1, "tensor_id": 2, "scale": torch.ones(2), "kind": projection,
            "directions": torch.ones(1, 16, 24),
        }  # fmt: skip
        case = Case(row, col, torch.tensor([0, 17, 40]), dim, options)
        with emulated(shared=kib << 10):
            compare(case, project(case))
    fused = {48: 0, 99: 1, 163: 2}[kib]
    assert len(went) == 4 - fused, "the fused kernel runs wherever the device has room for it"
    with emulated(shared=48 << 10), pytest.raises(RuntimeError, match="project_outer"):
        outputs = torch.zeros(2, 512), torch.zeros(0), torch.zeros(2, 0)
        how = torch.tensor([0, 17, 40]), torch.ones(2), None, None, [], None, 0, 1, 2, 0, 0
        torch.ops.dataflex_emu.project_outer(*outputs, row, col, *how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_emulated_kernels_give_the_same_bits_in_every_order(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(5)
    row, col = torch.randn(50, 72, generator=draw).to(dtype), torch.randn(50, 264, generator=draw).to(dtype)
    results = []
    for order in ORDERS:
        for projection in ("xorfold", "countsketch", "sjlt"):
            options = {
                "transform": Transform(), "seed": 1, "tensor_id": 2, "scale": torch.ones(3), "kind": projection,
                "directions": torch.ones(1, 72, 264),
            }  # fmt: skip
            with emulated(*order):
                results.append(project(Case(row, col, torch.tensor([0, 7, 20, 50]), 2048, options)))
    for again in range(3, len(results)):
        assert all(torch.equal(a, b) for a, b in zip(results[again], results[again % 3], strict=True))


@pytest.mark.parametrize("projection", ["xorfold", "countsketch", "sjlt"])
@pytest.mark.parametrize("kernels", [False, True])
def test_rows_of_an_embedding_equal_float64(projection: str, kernels: bool, native_cpu: Any) -> None:
    draw = torch.Generator().manual_seed(6)
    row_ids, values = torch.randint(0, 30, (40,), generator=draw), torch.randn(40, 150, generator=draw)
    moments = {"exp_avg": 0.1 * torch.randn(30, 150, generator=draw), "exp_avg_sq": torch.rand(30, 150, generator=draw)}
    directions = torch.randn(5, 30, 150, generator=draw)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        results = [torch.zeros(4, *rest, dtype=dtype) for rest in ((512,), (), (5,))]
        of = Projection(
            tensor_id=8,
            seed=7,
            transform=Transform("adam_less", 0.9, 0.99, 1e-4),
            kind=projection,
            row_offset=5,
            directions=directions.to(dtype),
            **{name: moment.to(dtype) for name, moment in moments.items()},
        )
        project_rows_(Sums(*results), row_ids, values.to(dtype), torch.tensor([0, 10, 10, 11, 40]), of)
        return results

    want = run(torch.float64)
    if kernels:
        with emulated("random", 4):
            got = run(torch.float32)
    else:
        got = run(torch.float32)
    assert all(error(a, b) < BUDGET for a, b in zip(got, want, strict=True))


def test_native_ops_run_where_they_should(native_cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference must not stand in silently: float32 and the three native kinds never reach it."""

    def refuse(*_: Any) -> None:
        raise AssertionError("portable")

    monkeypatch.setattr(reference, "project_outer", refuse)
    case = fixed_cases()[0]
    for projection in ("xorfold", "countsketch", "sjlt"):
        project(case._replace(options=case.options | {"kind": projection}))
    with pytest.raises(AssertionError, match="portable"):
        project(case, torch.float64)
    with pytest.raises(AssertionError, match="portable"):
        project(case._replace(options=case.options | {"kind": "rademacher"}))
    assert project_native.implementation(torch.device("cpu")).startswith("native cpu (xorfold, countsketch, sjlt;")


def opcheck_arguments() -> list[tuple[str, tuple[Any, ...]]]:
    draw = torch.Generator().manual_seed(8)
    out, sqnorm, dots = torch.zeros(2, 64), torch.zeros(2), torch.zeros(2, 1)
    m, v, toward = (torch.rand(n, 24, generator=draw) for n in (6, 6, 6))
    common = (m, v, [0.9, 0.1, 0.99, 0.01, 1e-4, 0.0], toward[None], 0, 1, 2, 0, 0)
    row, col = torch.randn(5, 6, generator=draw), torch.randn(5, 24, generator=draw)
    bounds, scale = torch.tensor([0, 2, 5]), torch.ones(2)
    outer = (out, sqnorm, dots, row, col, bounds, scale, *common)
    matrices = (out, sqnorm, dots, torch.randn(2, 6, 24), None, torch.tensor([0, 1, 2]), scale, *common, False)
    rows = (out, sqnorm, dots, torch.randn(5, 1, 24), torch.tensor([0, 3, 1, 2, 5]), bounds, scale, *common, True)
    return [("project_outer", outer), ("project_values", matrices), ("project_values", rows)]


@pytest.mark.parametrize(("name", "arguments"), opcheck_arguments())
def test_opcheck(name: str, arguments: tuple[Any, ...], native_cpu: Any) -> None:
    torch.library.opcheck(getattr(native_cpu, name).default, arguments)


def test_a_direct_call_with_wrong_shapes_is_refused_before_memory_is_touched(native_cpu: Any) -> None:
    (_, outer), (_, matrices), (_, rows) = opcheck_arguments()
    for op, arguments, place, bad in (
        ("project_outer", outer, 5, torch.tensor([0, 2, 50])),
        ("project_outer", outer, 7, torch.zeros(3, 24)),
        ("project_outer", outer, 6, torch.ones(1)),
        ("project_outer", outer, 0, torch.zeros(2, 48)),
        ("project_values", matrices, 3, torch.zeros(1, 6, 24)),
        ("project_values", rows, 4, torch.tensor([0, 3, 1, 2, 6])),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            getattr(native_cpu, op)(*arguments[:place], bad, *arguments[place + 1 :])


def test_kernels_stay_inside_memory_where_the_host_cannot_look(native_cpu: Any) -> None:
    """On a GPU bounds and row ids are not read back: bounds are clamped, a row that is not there spoils its sample."""
    (_, outer), _, (_, rows) = opcheck_arguments()
    half = [x.to(torch.bfloat16) for x in (torch.ones(5, 8), torch.ones(5, 24))]
    moments = [torch.ones(8, 24), torch.ones(8, 24)]
    bad = torch.tensor([0, 2, 1 << 40])
    results = []
    for bounds in (bad, torch.tensor([0, 2, 5])):
        out = torch.zeros(2, 512)
        with emulated():
            torch.ops.dataflex_emu.project_outer(
                out, torch.zeros(2), torch.zeros(2, 0), *half, bounds, outer[6], *moments, outer[9], None, *outer[11:]
            )
        results.append(out)
    assert torch.equal(*results)
    out = torch.zeros(2, 64)
    with emulated():
        ids = torch.tensor([0, 3, 1, 1 << 40, 5])
        torch.ops.dataflex_emu.project_values(out, *rows[1:4], ids, *rows[5:])
    assert out[0].isfinite().all() and out[1].isnan().any()
