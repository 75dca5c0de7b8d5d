"""What is built: one builder a library, with DeepSpeed's op-builder interface (not its base class).

``cpu``   csrc/cpu and its bindings; csrc/cpu/x_avx2.cpp and x_avx512.cpp are compiled for those instruction sets
          with DATAFLEX_ISA defined as their namespace, and chosen at run time (csrc/include/dataflex/cpu.h).
``cuda``  csrc/kernels by nvcc and their bindings.
``emu``   the same csrc/kernels by the C++ compiler over csrc/emu, on CPU tensors, for tests.
``host``  csrc/host, a Python module without torch.
The first three use torch's stable ABI: a library runs with any torch from `TORCH_TARGET` on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from dataflex.ops.native._build import BuildError, Library, Unit, included, obtain
from dataflex.ops.native.toolchain import (
    TORCH_TARGET,
    architecture_flags,
    cache_folder,
    compiler,
    csrc,
    cuda_architectures,
    is_x86,
    nvcc,
    torch_folder,
    torch_too_old,
    version_of,
)

_VARIANTS = {
    "_avx2": ("-mavx2", "-mfma", "-mf16c", "-DDATAFLEX_ISA=avx2"),
    "_avx512": (
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        *("-mprefer-vector-width=512", "-DDATAFLEX_ISA=avx512"),
    ),
}
_CXX = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
_LINK = ("-Wl,-z,defs",)
_SANITIZED = ("-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined")
_WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas")


class NativeBuilder:
    """Builds and loads one library; subclasses say what is in it."""

    NAME: ClassVar[str]
    FOLDERS: ClassVar[tuple[str, ...]]
    BINDINGS: ClassVar[str | None] = None
    MACROS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, name: str | None = None) -> None:
        self.name = name or self.NAME
        self.root = csrc()

    def absolute_name(self) -> str:
        return f"dataflex.{self.name}"

    def file_name(self) -> str:
        return f"libdataflex_{self.name}.so"

    def sources(self) -> list[str]:
        """Relative to csrc/: all of the builder's folders, and the bindings made for it or for all."""
        found = [path for folder in self.FOLDERS for path in (self.root / folder).iterdir()]
        if self.BINDINGS:
            bindings = list((self.root / "bindings").iterdir())
            other = "_cuda" if self.BINDINGS == "_cpu" else "_cpu"
            found += [path for path in bindings if not path.stem.endswith(other)]
        if not is_x86():
            found = [path for path in found if not path.stem.endswith(tuple(_VARIANTS))]
        return sorted(str(p.relative_to(self.root)) for p in found if p.suffix in (".cpp", ".cu"))

    def include_paths(self) -> list[str]:
        return [str(self.root / "include")]

    def cxx_args(self) -> list[str]:
        return [*_CXX, "-O3", *_WARNINGS, *self.sanitizers()]

    def sanitizers(self) -> list[str]:
        """$DATAFLEX_SANITIZE, like ``address,undefined``: for the tests, with libasan loaded before Python.

        ``thread`` watches the emulated kernels only: TSan knows its fibers, but not the pool of torch.
        """
        asked = os.environ.get("DATAFLEX_SANITIZE")
        return [f"-fsanitize={asked}", *_SANITIZED] if asked and asked != "thread" else []

    def nvcc_args(self) -> list[str]:
        return []

    def extra_ldflags(self) -> list[str]:
        folder = torch_folder() / "lib"
        return [f"-L{folder}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]

    def why_not(self) -> str | None:
        """Why this library cannot be built here, one line; None where it can."""
        if shutil.which(compiler()[0]) is None:
            return f"no C++ compiler: '{compiler()[0]}' is not there (set CXX)"
        return None

    def is_compatible(self, verbose: bool = False) -> bool:
        reason = self.why_not()
        if verbose and reason:
            print(f"{self.absolute_name()}: {reason}", file=sys.stderr)
        return reason is None

    def identity(self) -> str:
        """Versions of what makes the library."""
        import torch

        return f"{version_of(*compiler())} {torch.__version__}"

    def unit(self, source: str) -> Unit:
        """The command for one source: nvcc for .cu where this builder has it, else the C++ compiler."""
        path, args = self.root / source, [*self.MACROS]
        if path.suffix == ".cu" and self.nvcc_args():
            command = [str(nvcc()), *self.nvcc_args()]
        else:
            command = [*compiler(), *self.cxx_args()]
            args += next((flags for suffix, flags in _VARIANTS.items() if path.stem.endswith(suffix)), ())
            args += ["-x", "c++"] if path.suffix == ".cu" else []
        include = [f"-I{folder}" for folder in self.include_paths()]
        if self.BINDINGS and source.startswith("bindings/"):
            target = (TORCH_TARGET[0] << 56) | (TORCH_TARGET[1] << 48)
            include += ["-isystem", str(torch_folder() / "include"), f"-DTORCH_TARGET_VERSION={target:#x}"]
        folders = tuple(Path(folder) for folder in self.include_paths())
        return Unit(path, (*command, *args, *include), folders)

    def source_digest(self) -> str:
        """Of the sources and headers alone: the same on every machine."""
        units = [self.unit(source) for source in self.sources()]
        files = {path for unit in units for path in included(unit.source, unit.include_paths)}
        digest = hashlib.sha256()
        for path in sorted(files):
            digest.update(str(path.relative_to(self.root)).encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()

    def library(self) -> Library:
        units = tuple(self.unit(source) for source in self.sources())
        link = (*compiler(), "-shared", *([] if os.environ.get("DATAFLEX_SANITIZE") else _LINK), *self.sanitizers())
        return Library(self.file_name(), self.root, units, link, tuple(self.extra_ldflags()), self.identity())

    def build(self) -> Path:
        """The library's file, built if it is not in the cache. BuildError, one line, where that fails."""
        reason = self.why_not()
        if reason:
            raise BuildError(reason)
        built = obtain([self.library()], cache_folder())[self.file_name()]
        if isinstance(built, BuildError):
            raise built
        return built

    def load(self, verbose: bool = False) -> Any:
        """`torch.ops.dataflex` (or the module `host`) with this library in it, built first where needed."""
        import torch

        path = self.build()
        if verbose:
            print(f"{self.absolute_name()}: {path}", file=sys.stderr)
        ops: Any = torch.ops
        ops.load_library(str(path))
        return ops.dataflex_emu if self.name == "emu" else ops.dataflex


class CpuBuilder(NativeBuilder):
    NAME, FOLDERS, BINDINGS, MACROS = "cpu", ("cpu",), "_cpu", ("-DDATAFLEX_CPU",)

    def why_not(self) -> str | None:
        return torch_too_old() or super().why_not()


class EmuBuilder(NativeBuilder):
    """No contraction of products and sums: what the emulated kernels compute does not depend on the optimiser."""

    NAME, FOLDERS, BINDINGS, MACROS = "emu", ("kernels", "emu"), "_cuda", ("-DDATAFLEX_EMU",)

    def include_paths(self) -> list[str]:
        return [*super().include_paths(), str(self.root / "emu")]

    def cxx_args(self) -> list[str]:
        return [*_CXX, "-O2", "-ffp-contract=off", *_WARNINGS, *self.sanitizers()]

    def unit(self, source: str) -> Unit:
        made = super().unit(source)
        if os.environ.get("DATAFLEX_SANITIZE") != "thread":
            return made
        watched = ("-g", "-O1", "-fsanitize=thread") if source.startswith("kernels/") else ("-DDATAFLEX_EMU_TSAN",)
        return Unit(made.source, (*made.command, *watched), made.include_paths)

    def extra_ldflags(self) -> list[str]:
        watch = ["-fsanitize=thread"] if os.environ.get("DATAFLEX_SANITIZE") == "thread" else []
        return [*super().extra_ldflags(), *watch]

    def why_not(self) -> str | None:
        return torch_too_old() or super().why_not()


class CudaBuilder(NativeBuilder):
    NAME, FOLDERS, BINDINGS, MACROS = "cuda", ("kernels",), "_cuda", ("-DDATAFLEX_CUDA",)

    def nvcc_args(self) -> list[str]:
        host = ["-Xcompiler=-fPIC,-fvisibility=hidden"]
        host += ["-ccbin", compiler()[0]] if len(compiler()) == 1 else []
        return ["-std=c++17", "-O3", "-lineinfo", *host, *architecture_flags(cuda_architectures())]

    def extra_ldflags(self) -> list[str]:
        top = Path(str(nvcc())).resolve().parents[1]
        folders = [top / "lib64", top / "targets" / f"{platform.machine()}-linux" / "lib"]
        places = [f"-L{folder}" for folder in folders if folder.is_dir()]
        return [*super().extra_ldflags(), *places, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]

    def why_not(self) -> str | None:
        if nvcc() is None:
            return "no CUDA compiler: nvcc is not there (set CUDA_HOME)"
        return torch_too_old() or super().why_not()

    def identity(self) -> str:
        return f"{super().identity()} {version_of(str(nvcc()))}"


class HostBuilder(NativeBuilder):
    NAME, FOLDERS = "host", ("host",)

    def file_name(self) -> str:
        return f"_dataflex_host{sysconfig.get_config_var('EXT_SUFFIX')}"

    def include_paths(self) -> list[str]:
        import pybind11

        return [*super().include_paths(), pybind11.get_include(), sysconfig.get_paths()["include"]]

    def cxx_args(self) -> list[str]:
        return [*_CXX, "-O1", *_WARNINGS, f'-DDATAFLEX_FLAGS="{shlex.join(CpuBuilder().cxx_args())}"']

    def extra_ldflags(self) -> list[str]:
        return []

    def identity(self) -> str:
        return f"{version_of(*compiler())} {sys.version}"

    def library(self) -> Library:
        made = super().library()
        return Library(made.file_name, made.root, made.units, (*compiler(), "-shared"), (), made.identity)

    def load(self, verbose: bool = False) -> ModuleType:
        path = self.build()
        if verbose:
            print(f"{self.absolute_name()}: {path}", file=sys.stderr)
        return import_module_file("_dataflex_host", path)


BUILDERS: dict[str, type[NativeBuilder]] = {b.NAME: b for b in (CpuBuilder, CudaBuilder, EmuBuilder, HostBuilder)}


def import_module_file(name: str, path: Path) -> ModuleType:
    """Import the extension module ``name`` from ``path``."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
