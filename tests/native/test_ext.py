"""Finding, building and loading the native libraries as a user does, in processes of their own.

The package is copied with the probe op alone, so that a build takes seconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from dataflex.ops import implementations
from dataflex.ops.native import _ext, builder, toolchain
from dataflex.utils.errors import UserError
from tests.processes import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
CSRC = (
    *("include/dataflex/portable.cuh", "include/dataflex/cpu.h", "kernels/api.h", "kernels/probe.cu", "cpu/isa.cpp"),
    *("bindings/common.h", "bindings/probe_cpu.cpp", "bindings/probe_cuda.cpp", "host/module.cpp"),
)
LOAD = "from dataflex.ops.native import _ext; print(_ext.load('cpu')); _ext.load('cpu')"
LOSS = """
import torch
from dataflex.ops import per_sample_loss
logits, labels, cu = torch.zeros(3, 5), torch.tensor([1, 2, -100]), torch.tensor([0, 2, 3])
print(per_sample_loss(logits, labels, cu).loss.tolist(), per_sample_loss(logits, labels, cu).count.tolist())
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("dataflex", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_lib"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in CSRC:
        (folder / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "csrc" / name, folder / "csrc" / name)
    shutil.copytree(ROOT / "csrc" / "emu", folder / "csrc" / "emu")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the tests that build for real."""
    return tmp_path_factory.mktemp("cache")


def python(program: str, package: Path, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DATAFLEX_") and name != "CXX"}
    whole = kept | {"PYTHONPATH": str(package)} | env
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=whole, cwd=package, capture_output=True, text=True, timeout=PATIENCE_S)


def test_the_first_use_builds_and_the_second_finds(checkout: Path, cache: Path) -> None:
    first = python(LOAD, checkout, DATAFLEX_CACHE=str(cache))
    second = python(LOAD, checkout, DATAFLEX_CACHE=str(cache), DATAFLEX_LOG_LEVEL="INFO")
    assert first.stdout.startswith("Loaded(group='cpu'") and first.stdout == second.stdout
    assert first.stderr == f"Building the native cpu ops (once; kept in {cache})\n"
    assert second.stderr == ""
    facts = "from dataflex.ops.native import _ext; h = _ext.host(); print(h.cpu_features(), h.build_facts())"
    told = python(facts, checkout, DATAFLEX_CACHE=str(cache), CXX="g++")
    assert "-fno-trapping-math" in told.stdout and told.stderr == "", "the host helper was built in the same run"


def test_a_failing_compiler_falls_back_with_its_reason_on_one_line(checkout: Path, tmp_path: Path) -> None:
    done = python(LOAD + LOSS, checkout, DATAFLEX_CACHE=str(tmp_path), CXX="false", DATAFLEX_LOG_LEVEL="WARNING")
    assert "[1.609437" in done.stdout and done.stdout.endswith("[2, 0]\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("dataflex: no native cpu ops, PyTorch runs instead: `false` ended with an error"), line
    next_start = python(LOAD, checkout, DATAFLEX_CACHE=str(tmp_path), CXX="false", DATAFLEX_LOG_LEVEL="INFO")
    assert next_start.stderr.splitlines() == [line], "said once more, and not built once more"


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler: 'no-such-compiler' is not there (set CXX)"),
        ({"DATAFLEX_JIT": "0"}, "libdataflex_cpu.so is not prebuilt and DATAFLEX_JIT=0"),
        (
            {"DATAFLEX_CACHE": "/dev/null/cache"},
            "the cache cannot be written: [Errno 20] Not a directory: '/dev/null/cache' (set DATAFLEX_CACHE)",
        ),
    ],
)
def test_what_is_missing_is_said_on_one_line(checkout: Path, tmp_path: Path, env: dict[str, str], reason: str) -> None:
    done = python(LOAD, checkout, **{"DATAFLEX_CACHE": str(tmp_path), "DATAFLEX_LOG_LEVEL": "WARNING"} | env)
    assert done.stdout.startswith("Unavailable(group='cpu'")
    assert done.stderr == f"dataflex: no native cpu ops, PyTorch runs instead: {reason}\n"
    assert not list(tmp_path.iterdir())


def test_portable_ops_are_a_choice_and_said_by_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATAFLEX_OPS", "portable")
    assert _ext.ops_for(torch.device("cpu")) is None
    assert set(implementations().values()) == {"portable PyTorch: DATAFLEX_OPS=portable"}
    monkeypatch.setenv("DATAFLEX_OPS", "portabel")
    expected = r"DATAFLEX_OPS: expected native or portable, got 'portabel' \(did you mean 'portable'\?\)"
    with pytest.raises(UserError, match=expected):
        _ext.load("cpu")


def test_an_old_torch_and_a_machine_without_cuda_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert builder.CpuBuilder().why_not() == "torch 2.9.1+cpu is older than 2.10"
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert toolchain.nvcc.__wrapped__() is None
    assert _ext.ops_for(torch.device("meta")) is None


def test_the_native_ops_run_on_torchs_own_threads() -> None:
    """No second pool: a parallel native op starts no thread that torch has not started."""
    if isinstance(_ext.load("cpu"), _ext.Unavailable):
        pytest.skip("no native cpu ops here")
    x = torch.rand(1 << 21)
    program = (
        "import os, torch; from dataflex.ops.native import _ext; _ext.load('cpu'); torch.set_num_threads(3)\n"
        "x = torch.rand(1 << 21); (x + 1).sum(); before = len(os.listdir('/proc/self/task'))\n"
        "torch.ops.dataflex.probe(x); print(len(os.listdir('/proc/self/task')) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout == "0\n", done.stderr
    torch.testing.assert_close(torch.ops.dataflex.probe(x), x + 1, rtol=0, atol=0)


def test_the_probe_passes_opcheck() -> None:
    if isinstance(_ext.load("cpu"), _ext.Unavailable):
        pytest.skip("no native cpu ops here")
    torch.library.opcheck(torch.ops.dataflex.probe.default, (torch.rand(7),))


def test_variant_files_define_nothing_that_other_files_share() -> None:
    """The linker keeps one copy of an inline function: an AVX-512 copy of a shared one would run everywhere."""
    native = builder.CpuBuilder()
    if not toolchain.is_x86() or native.why_not() or shutil.which("nm") is None:
        pytest.skip("needs an x86 processor, a C++ compiler and nm")
    native.build()
    objects = native.library().objects()
    variants = [name for name, unit in objects.items() if unit.source.stem.endswith(("_avx2", "_avx512"))]
    assert variants
    for name in variants:
        path = toolchain.cache_folder() / "objects" / name
        symbols = subprocess.check_output(["nm", "-C", "--defined-only", str(path)], text=True).splitlines()
        shared = [line for line in symbols if line.split()[1] in "WVu" and "dataflex::avx" not in line]
        assert not shared, f"{name}: {shared}"


@pytest.mark.slow
def test_a_wheel_with_prebuilt_libraries_needs_no_compiler(checkout: Path, cache: Path, tmp_path: Path) -> None:
    env = os.environ | {"DATAFLEX_BUILD": "1", "DATAFLEX_CACHE": str(cache)}
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", str(tmp_path), str(checkout)], check=True, capture_output=True, text=True, env=env)
    (wheel,) = tmp_path.iterdir()
    assert not wheel.name.endswith("none-any.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    without = {"DATAFLEX_JIT": "0", "CXX": "false", "DATAFLEX_CACHE": str(tmp_path / "none")}
    done = python(LOAD + "\nprint(_ext.host().cpu_features())", site, **without)
    assert f"path=PosixPath('{site}/dataflex/_lib/libdataflex_cpu.so')" in done.stdout and done.stderr == ""
    (site / "dataflex" / "csrc" / "cpu" / "isa.cpp").write_text("// another text")
    assert "is not prebuilt and DATAFLEX_JIT=0" in python(LOAD, site, **without).stdout, "made from other sources"
