"""What a built library is known by: one ingredient at a time changes its key, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from dataflex.ops.native import builder, toolchain
from dataflex.ops.native._build import Library, Unit
from dataflex.ops.native.builder import BUILDERS, CpuBuilder, EmuBuilder

SOURCES = {
    "a.cpp": '#include "x.h"\n',
    "b.cpp": "int b;\n",
    "include/x.h": '#include "y.h"\n',
    "include/y.h": "int y;\n",
}


@pytest.fixture
def library(tmp_path: Path) -> Library:
    root = tmp_path / "csrc"
    for name, text in (SOURCES | {"include/unused.h": ""}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    include = (root / "include",)
    units = tuple(Unit(root / name, ("g++", f"-I{include[0]}"), include) for name in ("a.cpp", "b.cpp"))
    return Library("lib.so", root, units, ("g++", "-shared"), ("-lm",), "g++ 1")


def moved(library: Library, root: Path) -> Library:
    """The same sources in another place."""
    library.root.rename(root)
    include = (root / "include",)
    units = tuple(Unit(root / u.source.name, ("g++", f"-I{include[0]}"), include) for u in library.units)
    return replace(library, root=root, units=units)


def with_unit(library: Library, **changes: Any) -> Library:
    first, *rest = library.units
    return replace(library, units=(replace(first, **changes), *rest))


# Of each field of a library and of a unit: a change, and whether the key changes with it.
LIBRARY: dict[str, tuple[Callable[[Library, Path], Library], bool]] = {
    "file_name": (lambda x, _: replace(x, file_name="other.so"), False),  # it is the file's name beside the key
    "root": (lambda x, folder: moved(x, folder / "elsewhere"), False),
    "units": (lambda x, _: replace(x, units=x.units[:1]), True),
    "link": (lambda x, _: replace(x, link=(*x.link, "-s")), True),
    "link_libraries": (lambda x, _: replace(x, link_libraries=("-lc",)), True),
    "identity": (lambda x, _: replace(x, identity="g++ 2"), True),
}
UNIT: dict[str, tuple[Callable[[Library], Library], bool]] = {
    "source": (lambda x: with_unit(x, source=x.root / "include" / "x.h"), True),
    "command": (lambda x: with_unit(x, command=(*x.units[0].command, "-O3")), True),
    "include_paths": (lambda x: with_unit(x, include_paths=()), True),
}


@pytest.mark.parametrize("name", [f.name for f in fields(Library)])
def test_fields_of_a_library(library: Library, tmp_path: Path, name: str) -> None:
    before = library.key()
    assert before == library.key()
    change, counts = LIBRARY[name]
    assert (change(library, tmp_path).key() != before) == counts


@pytest.mark.parametrize("name", [f.name for f in fields(Unit)])
def test_fields_of_a_unit(library: Library, name: str) -> None:
    before = library.key()
    change, counts = UNIT[name]
    changed = change(library)
    assert (changed.key() != before) == counts
    same = set(library.objects()) & set(changed.objects())
    assert len(same) == 1, "the objects of other units stay"


@pytest.mark.parametrize("name", SOURCES)
def test_sources_and_what_they_include_at_any_depth(library: Library, name: str) -> None:
    before = library.key()
    (library.root / name).write_text(SOURCES[name] + "// more\n")
    assert library.key() != before
    (library.root / name).write_text(SOURCES[name])
    (library.root / "include" / "unused.h").write_text("int unused;\n")
    assert library.key() == before


def environment(name: str, value: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setenv(name, value)


def compiler_version(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(builder, "version_of", lambda *command: "another")


def torch_version(patch: pytest.MonkeyPatch) -> None:
    import torch

    patch.setattr(torch, "__version__", "9.9.9")


def torch_target(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(builder, "TORCH_TARGET", (2, 99))


def machine(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(toolchain.platform, "machine", lambda: "aarch64")


# What the real libraries of the CPU and of the emulation are made with.
INGREDIENTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "the compiler": (environment("CXX", "g++ -DOTHER"), {"cpu", "emu"}),
    "its version": (compiler_version, {"cpu", "emu"}),
    "torch's version": (torch_version, {"cpu", "emu"}),
    "torch's stable ABI": (torch_target, {"cpu", "emu"}),
    "sanitizers": (environment("DATAFLEX_SANITIZE", "address"), {"cpu", "emu"}),
    "the sanitizer of threads": (environment("DATAFLEX_SANITIZE", "thread"), {"cpu", "emu"}),
    "the machine": (machine, {"cpu"}),  # the emulation has one instruction set
    "the CUDA architectures": (environment("DATAFLEX_CUDA_ARCHS", "9.0"), set()),
    "the number of jobs": (environment("MAX_JOBS", "1"), set()),
    "another cache": (environment("DATAFLEX_CACHE", "/elsewhere"), set()),
}


@pytest.mark.parametrize("case", INGREDIENTS)
def test_what_the_libraries_are_made_with(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not toolchain.is_x86() and case == "the machine":
        pytest.skip("has one instruction set already")
    monkeypatch.delenv("DATAFLEX_SANITIZE", raising=False)
    kinds = (CpuBuilder, EmuBuilder)
    before = {kind.NAME: kind().library().key() for kind in kinds}
    assert before == {kind.NAME: kind().library().key() for kind in kinds}
    change, counts = INGREDIENTS[case]
    change(monkeypatch)
    after = {kind.NAME: kind().library().key() for kind in kinds}
    assert {name for name in before if after[name] != before[name]} == counts


def test_libraries_of_different_builders_have_different_keys() -> None:
    keys = {name: kind().library().key() for name, kind in BUILDERS.items() if name != "cuda"}
    assert len(set(keys.values())) == len(keys)
