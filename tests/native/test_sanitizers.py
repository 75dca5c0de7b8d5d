"""The ops' own tests once more under sanitizers, on torch's own tensors.

AddressSanitizer and UBSan: the CPU ops and the emulated kernels; torch then allocates through the sanitizer, so that
an access past a tensor is seen, by line. ThreadSanitizer: the emulated kernels, each CUDA thread a thread to it; what
is not ordered by a barrier, an atomic or a warp's synchronisation is a race, whatever order the threads ran in.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataflex.ops.native.builder import CpuBuilder
from dataflex.ops.native.toolchain import compiler

ROOT = Path(__file__).resolve().parents[2]
BUILD = "from dataflex.ops.native.builder import *; CpuBuilder().build(); EmuBuilder().build()"
OVERRUN = """
import ctypes, torch
from dataflex.ops.native import _ext
library = ctypes.CDLL(str(_ext.load("emu").path))
x, y = torch.zeros(500), torch.zeros(500)
library.dataflex_probe(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(501), None)
print("not seen")
"""
KERNEL_TESTS = ("tests/native/test_loss.py", "tests/native/test_project.py")
EMULATED = "tests/native/test_emulation.py::test_the_emulated_library_runs_on_tensors"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CpuBuilder().why_not() is not None, reason="needs a C++ compiler"),
]


def environment(sanitize: str, *runtimes: str) -> dict[str, str]:
    """Builds the libraries, without the preloaded sanitizer that slows the compiler; what Python then runs under."""
    env = os.environ | {"DATAFLEX_SANITIZE": sanitize, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", BUILD], cwd=ROOT, env=env, check=True)
    ask = [[*compiler(), f"-print-file-name={name}"] for name in runtimes]
    files = [subprocess.check_output(command, text=True).strip() for command in ask]
    if not all(Path(file).is_absolute() for file in files):
        pytest.skip("the compiler comes without its sanitizers' libraries")
    return env | {"LD_PRELOAD": ":".join(files)}


@pytest.fixture(scope="module")
def addresses() -> dict[str, str]:
    return environment("address,undefined", "libasan.so", "libubsan.so")


def run_tests(env: dict[str, str], folder: Path, *tests: str) -> None:
    """Run them; a sanitizer that ends the process has written to ``folder``, which pytest does not capture."""
    options = f"halt_on_error=1:log_path={folder / 'found'}"
    env = env | {
        "ASAN_OPTIONS": f"{options}:detect_leaks=0",
        "UBSAN_OPTIONS": options,
        # TSan does not know how the pool of torch waits, and looks at the emulated kernels alone.
        "TSAN_OPTIONS": f"{options}:ignore_noninstrumented_modules=1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    found = "\n".join(path.read_text()[:4000] for path in folder.iterdir())
    assert done.returncode == 0 and not found, f"{found}\n{(done.stdout + done.stderr)[-4000:]}"


def test_an_access_past_a_tensor_is_seen_by_line(addresses: dict[str, str]) -> None:
    env = addresses | {"ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([sys.executable, "-c", OVERRUN], cwd=ROOT, env=env, capture_output=True, text=True)
    assert "heap-buffer-overflow" in done.stderr and "probe.cu:" in done.stderr and "not seen" not in done.stdout


def test_the_ops_keep_to_their_memory(addresses: dict[str, str], tmp_path: Path) -> None:
    run_tests(addresses, tmp_path, "tests/ops", EMULATED, *KERNEL_TESTS)


def test_the_emulated_kernels_have_no_races(tmp_path: Path) -> None:
    """The tests of the op families with "emulated" in their names; those over drawn cases would take too long."""
    run_tests(environment("thread", "libtsan.so"), tmp_path, "-k", "emulated and not drawn", EMULATED, *KERNEL_TESTS)
