"""nvcc compiles every kernel for each architecture that wheels carry: no warning, no spill, registers recorded.

`python -m tests.native.test_nvcc` prints the table of registers, stack and shared memory as CSV.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dataflex.ops.native.builder import CudaBuilder
from dataflex.ops.native.toolchain import csrc, nvcc

ARCHITECTURES = ("80", "90", "100")
MOST_REGISTERS = 255
HEADER = "kernel,architecture,registers,stack_bytes,spilled_bytes,shared_bytes"
KERNELS = sorted((csrc() / "kernels").glob("*.cu"))
_FUNCTION = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")

pytestmark = pytest.mark.skipif(nvcc() is None, reason="nvcc is not there")


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture, as ptxas -v tells it."""

    function: str
    architecture: str
    registers: int
    stack_bytes: int
    spilled_bytes: int
    shared_bytes: int

    def row(self) -> str:
        sizes = f"{self.registers},{self.stack_bytes},{self.spilled_bytes},{self.shared_bytes}"
        return f"{self.function},sm_{self.architecture},{sizes}"


def compile_kernels(source: Path, folder: Path, architecture: str, *flags: str) -> list[Compiled]:
    command = [str(nvcc()), "-std=c++17", "-O3", "-Xcompiler=-fPIC", "-Werror", "all-warnings", "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", *CudaBuilder.MACROS, *flags]
    command += [f"-I{csrc() / 'include'}", "-c", str(source), "-o", str(folder / "kernel.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return parse(done.stderr)


def parse(text: str) -> list[Compiled]:
    found = []
    for block in re.split(r"(?=Compiling entry function)", text)[1:]:
        function, spill, used = _FUNCTION.search(block), _SPILL.search(block), _USED.search(block)
        assert function and spill and used, block
        stack, stores, loads = map(int, spill.groups())
        shared = int(used[2] or 0)
        name = subprocess.check_output(["c++filt", "-p", function[1]], text=True).strip()
        name = name.replace("(anonymous namespace)::", "")
        found.append(Compiled(f'"{name}"', function[2], int(used[1]), stack, max(stores, loads), shared))
    return found


@pytest.mark.parametrize("architecture", ["90", *(pytest.param(a, marks=pytest.mark.slow) for a in ("80", "100"))])
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_every_kernel_compiles_without_warnings_and_spills(
    source: Path, architecture: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    assert architecture in ARCHITECTURES
    compiled = compile_kernels(source, tmp_path, architecture)
    assert compiled or "__global__" not in source.read_text()
    table = "\n".join(kernel.row() for kernel in compiled)
    record_property("registers", table)
    print(f"{HEADER}\n{table}")
    assert not [kernel.row() for kernel in compiled if kernel.spilled_bytes]
    assert not [kernel.row() for kernel in compiled if kernel.registers > MOST_REGISTERS]


SPILLING = """
__global__ void spilling(float* x) {
  float v[64];
  for (int i = 0; i < 64; i++) v[i] = x[i * 33 + threadIdx.x];
  for (int round = 0; round < 9; round++)
    for (int i = 0; i < 64; i++) v[i] = v[i] * v[(i + 7) % 64] + 1.0f;
  for (int i = 0; i < 64; i++) x[i * 33 + threadIdx.x] = v[i];
}
"""


def test_a_spill_and_a_warning_would_be_seen(tmp_path: Path) -> None:
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    (kernel,) = compile_kernels(source, tmp_path, "90", "-maxrregcount=24")
    assert kernel.spilled_bytes > 0
    source.write_text("__global__ void k(float* x) { int unused; x[0] = 1.0f; }")
    with pytest.raises(AssertionError, match="unused"):
        compile_kernels(source, tmp_path, "90")


@pytest.mark.slow
def test_the_cuda_library_links_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATAFLEX_CUDA_ARCHS", "9.0")
    path = CudaBuilder().build()
    needed = subprocess.run(["objdump", "-p", str(path)], capture_output=True, text=True).stdout
    assert "libtorch.so" in needed and "libcudart" not in needed, "the CUDA runtime is linked statically"


if __name__ == "__main__":
    print(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        for kernels in KERNELS:
            for number in ARCHITECTURES:
                print(*(kernel.row() for kernel in compile_kernels(kernels, Path(folder), number)), sep="\n")
