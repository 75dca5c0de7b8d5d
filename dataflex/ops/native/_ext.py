"""The native libraries: found, else built on first use, loaded once; and the ops that they implement.

An op family defines its internal ops here with `define` (schema and fake), implements them in csrc/bindings with
DATAFLEX_OPS, and asks `ops_for(device)` in its public function: the namespace to call, or None for the portable
reference. Environment: DATAFLEX_OPS=portable uses no native op, DATAFLEX_JIT=0 never compiles, DATAFLEX_CACHE is
where builds are kept, DATAFLEX_ISA=baseline|avx2 asks the CPU ops for less than the processor has.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from dataflex.ops.native._build import BuildError, obtain
from dataflex.ops.native.builder import BUILDERS, HostBuilder, NativeBuilder, import_module_file
from dataflex.ops.native.toolchain import cache_folder, csrc
from dataflex.ops.native.trust import altered
from dataflex.utils.errors import UserError, nearest
from dataflex.utils.logging import logger

Group = Literal["cpu", "cuda", "emu"]
NAMESPACES = {"cpu": "dataflex", "cuda": "dataflex", "emu": "dataflex_emu"}
_CHOICES = ("native", "portable")


@dataclass(frozen=True)
class Loaded:
    """A native library is in this process."""

    group: str
    path: Path


@dataclass(frozen=True)
class Unavailable:
    """It is not; ``reason`` is one line."""

    group: str
    reason: str


_torch: Any = torch  # untyped parts of torch are reached through this
_libraries = {space: _torch.library.Library(space, "FRAGMENT") for space in ("dataflex", "dataflex_emu")}
_loaded: dict[str, Loaded | Unavailable] = {}
_emulating = False


def define(schema: str, *, fake: Callable[..., Any] | None = None, tags: tuple[torch.Tag, ...] = ()) -> None:
    """Declare an op ``name(Tensor x, ...) -> ...`` of torch.ops.dataflex (and of dataflex_emu, for the tests).

    ``fake`` gives the outputs' shapes for meta tensors; it is not needed where the op returns nothing.
    """
    for space, library in _libraries.items():
        library.define(schema, tags=tags)
        if fake is not None:
            torch.library.register_fake(f"{space}::{schema.split('(')[0]}", fake, lib=library)


define("probe(Tensor x) -> Tensor", fake=torch.empty_like)


def load(group: Group) -> Loaded | Unavailable:
    """The library of ``group``, built first where needed. Tried once a process; what fails is said once."""
    if group != "emu" and _choice() == "portable":
        return Unavailable(group, "DATAFLEX_OPS=portable")
    if group not in _loaded:
        _loaded[group] = result = _load(group)
        if isinstance(result, Unavailable):
            logger.warning("dataflex: no native %s ops, PyTorch runs instead: %s", group, result.reason)
    return _loaded[group]


def ops_for(device: torch.device) -> Any | None:
    """The namespace whose ops run tensors on ``device``; None where the portable reference has to."""
    if _emulating and device.type == "cpu":
        return torch.ops.dataflex_emu
    if device.type == "cpu":
        return torch.ops.dataflex if isinstance(load("cpu"), Loaded) else None
    if device.type == "cuda":
        return torch.ops.dataflex if isinstance(load("cuda"), Loaded) else None
    return None


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Inside, ops on CPU tensors run the CUDA kernels under the host emulation. For tests: it is slow."""
    global _emulating
    result = load("emu")
    if isinstance(result, Unavailable):
        raise BuildError(result.reason)
    before, _emulating = _emulating, True
    try:
        yield
    finally:
        _emulating = before


def host() -> ModuleType | Unavailable:
    """The torch-free helper: cpu_features() and build_facts(). Built with the cpu library."""
    builder = HostBuilder()
    try:
        path = _prebuilt(builder) or _built([builder])[0]
        return import_module_file("_dataflex_host", path)
    except (BuildError, OSError, ImportError) as e:
        return Unavailable("host", _one_line(e))


def describe(group: Group) -> str:
    """One line: what runs on the devices of ``group``, and why not the native ops where they do not."""
    result = load(group)
    if isinstance(result, Unavailable):
        return f"portable PyTorch: {result.reason}"
    helper = host() if group == "cpu" else None
    facts = [] if helper is None or isinstance(helper, Unavailable) else helper.cpu_features()
    return f"native, {result.path}" + (f" ({' '.join(facts)})" if facts else "")


def _load(group: Group) -> Loaded | Unavailable:
    builder = BUILDERS[group]()
    if group == "cuda" and not torch.cuda.is_available():
        return Unavailable(group, "torch sees no CUDA device")
    try:
        path = _prebuilt(builder) or _built([builder, HostBuilder()] if group == "cpu" else [builder])[0]
        _torch.ops.load_library(str(path))
        _try_out(group)
    except (BuildError, OSError, RuntimeError) as e:
        return Unavailable(group, _one_line(e))
    return Loaded(group, path)


def _prebuilt(builder: NativeBuilder) -> Path | None:
    """The library that came with the package, if it was made from the sources that are here."""
    folder = Path(__file__).resolve().parents[2] / "_lib"
    stamp = folder / f"{builder.name}.sources"
    path = folder / builder.file_name()
    if not (path.is_file() and stamp.is_file() and stamp.read_text() == builder.source_digest()):
        return None
    problem = altered(path)
    if problem:
        logger.warning("%s: not loaded: %s", path, problem)
    return None if problem else path


def _built(builders: list[NativeBuilder]) -> list[Path]:
    """The file of the first builder; the others are built in the same run and may fail on their own."""
    reason = builders[0].why_not()
    if os.environ.get("DATAFLEX_JIT", "1") == "0":
        reason = f"{builders[0].file_name()} is not prebuilt and DATAFLEX_JIT=0"
    if not (csrc() / "kernels").is_dir():
        reason = f"the sources are not there: {csrc()}"
    if reason:
        raise BuildError(reason)
    libraries = [builder.library() for builder in builders if builder.why_not() is None]
    cache = cache_folder()

    def announce() -> None:
        logger.info("Building the native %s ops (once; kept in %s)", builders[0].name, cache)

    try:
        first = obtain(libraries, cache, announce)[builders[0].file_name()]
    except OSError as e:
        raise BuildError(f"the cache cannot be written: {e} (set DATAFLEX_CACHE)") from None
    if isinstance(first, BuildError):
        raise first
    return [first]


def _try_out(group: Group) -> None:
    """Run the probe: a library for other architectures than this device's fails here, not in training."""
    x = torch.arange(300, dtype=torch.float32, device="cuda" if group == "cuda" else "cpu")
    got: Tensor = getattr(torch.ops, NAMESPACES[group]).probe(x)
    if not torch.equal(got, x + 1):
        raise RuntimeError("the probe kernel gave wrong numbers")


def _choice() -> str:
    choice = os.environ.get("DATAFLEX_OPS", "native")
    if choice not in _CHOICES:
        valid = " or ".join(_CHOICES)
        raise UserError(f"DATAFLEX_OPS: expected {valid}, got '{choice}'{nearest(choice, _CHOICES)}")
    return choice


def _one_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
