"""The host emulation: right kernels give right numbers in every order of threads, and planted bugs are seen.

The planted kernels and their harness have no torch, so that ThreadSanitizer can watch them too.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dataflex.ops.native.toolchain import compiler, csrc
from tests.native.emulation import BIG_POISON, NAN_POISON, ORDERS, emulated
from tests.processes import PATIENCE_S

PLANTED = Path(__file__).parent / "planted"
FLAGS = [
    *("-std=c++17", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off"),
    *("-DDATAFLEX_EMU", f"-I{csrc() / 'include'}", f"-I{csrc() / 'emu'}"),
]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# How the runtime and the kernels are compiled: TSan watches the kernels only.
MODES = {"plain": ([], []), "asan": (SANITIZED, SANITIZED), "tsan": (["-DDATAFLEX_EMU_TSAN"], ["-fsanitize=thread"])}
RUNS = [(order, seed, NAN_POISON) for order, seed in ORDERS] + [("random", 3, BIG_POISON)]

Program = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The harness in a mode with a bug ("" for none), compiled once."""
    folder = tmp_path_factory.mktemp("planted")

    def runtime(mode: str) -> list[str]:
        objects = []
        for source in sorted((csrc() / "emu").glob("*.cpp")):
            target = folder / f"{mode}-{source.stem}.o"
            if not target.exists():
                command = [*compiler(), *FLAGS, *MODES[mode][0], "-c", str(source), "-o", str(target)]
                subprocess.run(command, check=True)
            objects.append(str(target))
        return objects

    def build(mode: str, bug: str) -> Path:
        target = folder / f"harness-{mode}-{bug}"
        if not target.exists():
            define = [f"-D{bug}"] if bug else []
            sources = [str(PLANTED / "harness.cpp"), *runtime(mode)]
            subprocess.run([*compiler(), *FLAGS, *MODES[mode][1], *define, *sources, "-o", str(target)], check=True)
        return target

    return build


def run(harness: Path, kernel: str, order: str, seed: int, poison: int) -> tuple[int, str]:
    """Exit status and what was printed."""
    number = ("forward", "reverse", "random").index(order)
    env = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=0"}
    command = [str(harness), kernel, str(number), str(seed), str(poison)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=PATIENCE_S)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("mode", ["plain", *(pytest.param(m, marks=pytest.mark.slow) for m in ("asan", "tsan"))])
def test_right_kernels_pass_in_every_order_of_threads(program: Program, mode: str) -> None:
    harness = program(mode, "")
    for order, seed, poison in RUNS:
        status, text = run(harness, "all", order, seed, poison)
        assert (status, text) == (0, "good\n"), (order, seed)


PLANTED_BUGS = [
    ("BUG_NO_BARRIER", "block_sum", "plain", r"wrong value: row sum: -?nan"),
    ("BUG_OFF_BY_ONE", "block_sum", "asan", r"heap-buffer-overflow .*block_sum\.cu:9 in block_sum"),
    ("BUG_UNINITIALISED", "block_sum", "plain", r"wrong value: row sum: -?nan"),
    ("BUG_PLAIN_ADD", "histogram", "tsan", r"data race .*histogram\.cu:\d+ in histogram"),
    (
        "BUG_SHARED_OVERRUN",
        "block_sum",
        "plain",
        r"shared memory written 0 bytes past the end of parts",
    ),
    ("BUG_DIVERGENT_BARRIER", "block_sum", "plain", r"at block_sum.cu:2\d: __syncthreads here, but other threads"),
    ("BUG_SKIPPED_BARRIER", "block_sum", "plain", r"stuck: .* wait in __syncwarp|lane 3 of the mask has ended"),
    ("BUG_INACTIVE_LANES", "block_sum", "plain", r"at block_sum.cu:\d+: __shfl_xor_sync here, but other lanes"),
    ("BUG_LANE_OUTSIDE", "block_sum", "plain", r"at block_sum.cu:38: a shuffle reads a lane outside its mask"),
    ("BUG_NO_FIRST_BARRIER", "histogram", "plain", r"wrong value: count"),
    ("BUG_NO_LAST_BARRIER", "histogram", "plain", r"wrong value: count"),
    ("BUG_NO_WAIT", "matmul", "plain", r"wrong value: product: -?nan"),
    ("BUG_SHARED_OVERRUN", "block_sum", "asan", r"block_sum\.cu:18:\d+: runtime error: index 4 out of bounds"),
    ("BUG_BIN_OFF_BY_ONE", "histogram", "asan", r"use-after-poison"),
    ("BUG_NO_BARRIER", "block_sum", "tsan", r"data race .*block_sum\.cu:\d+ in block_sum"),
    ("BUG_PLAIN_GLOBAL_ADD", "histogram", "tsan", r"data race .*histogram\.cu:\d+ in histogram"),
    ("BUG_NO_WARP_BARRIER", "matmul", "tsan", r"data race .* in .*ldmatrix"),
]
QUICK = 1  # the first runs in every test run, the others with the slow tests


@pytest.mark.parametrize(
    ("bug", "kernel", "mode", "seen"),
    [pytest.param(*case, marks=() if i < QUICK else pytest.mark.slow) for i, case in enumerate(PLANTED_BUGS)],
)
def test_a_planted_bug_is_seen(program: Program, bug: str, kernel: str, mode: str, seen: str) -> None:
    harness = program(mode, bug)
    texts = [text for status, text in (run(harness, kernel, *how) for how in RUNS) if status != 0]
    assert any(re.search(seen, text) for text in texts), texts


def test_every_planted_bug_has_a_case() -> None:
    written = {bug for path in PLANTED.glob("*.cu") for bug in re.findall(r"BUG_[A-Z_]+", path.read_text())}
    assert written == {case[0] for case in PLANTED_BUGS}


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_the_emulated_library_runs_on_tensors(order: str, seed: int) -> None:
    x = torch.arange(1000, dtype=torch.float32)
    with emulated(order, seed):
        assert torch.equal(torch.ops.dataflex_emu.probe(x), x + 1)
        assert torch.ops.dataflex_emu.probe(x[:0]).shape == (0,)
