# ruff: noqa: F811 - the fixture `folder` of another file
"""What is loaded into the process from the cache of builds: only what was built, where nobody else can write."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.ops.native import _build, _ext, trust
from dataflex.ops.native._build import BuildError
from dataflex.ops.native.builder import CpuBuilder
from dataflex.utils.logging import logger
from tests.native.test_build import built_in, compiled, folder  # noqa: F401 - a fixture

if shutil.which("g++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logger, "handlers", [handler])
    return lines


def plant(library: Path) -> None:
    """Put another library there, as somebody who can write the cache would."""
    library.write_bytes(b"\x7fELF planted")


def flip(library: Path) -> None:
    data = bytearray(library.read_bytes())
    data[len(data) // 2] ^= 1
    library.write_bytes(data)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "planted": (plant, "it is not as it was built"),
    "flipped": (flip, "it is not as it was built"),
    "cut short": (lambda path: os.truncate(path, 100), "it is not as it was built"),
    "no hash": (lambda path: trust.hash_file(path).unlink(), "libtiny.so.sha256 is missing"),
    "a hash of nothing": (lambda path: trust.hash_file(path).write_bytes(b"\xff"), "its hash cannot be read"),
    "others can write it": (lambda path: path.chmod(0o777), "libtiny.so can be written by others"),
    "others can write the folder": (lambda path: path.parent.chmod(0o777), "can be written by others"),
    "others can write the cache": (lambda path: path.parents[1].chmod(0o777), "cache can be written by others"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_as_it_was_built_is_built_anew(folder: Path, fault: str, said: list[str]) -> None:
    first = built_in(folder)
    assert isinstance(first, Path) and not said
    damage, why = FAULTS[fault]
    damage(first)
    second = built_in(folder)
    assert second == first and trust.distrusted(first, folder / "cache") is None
    assert said and all("not loaded, built anew" in line and why in line for line in said)
    assert ctypes.CDLL(str(second)).answer() == 42
    whole = "the cache" not in fault  # else its objects may be somebody else's too
    assert compiled(folder) == (["a.cpp", "b.cpp"] if whole else ["a.cpp", "a.cpp", "b.cpp", "b.cpp"])
    said.clear()
    assert built_in(folder) == first and not said


def test_a_planted_library_with_a_planted_hash_is_not_kept_in_a_loose_folder(folder: Path) -> None:
    first = built_in(folder)
    assert isinstance(first, Path)
    plant(first)
    trust.seal(first)
    first.parent.chmod(0o777)
    second = built_in(folder)
    assert isinstance(second, Path) and ctypes.CDLL(str(second)).answer() == 42


def test_a_damaged_object_is_not_linked(folder: Path) -> None:
    first = built_in(folder)
    assert isinstance(first, Path)
    first.unlink()
    plant(next((folder / "cache" / "objects").glob("a-*.o")))
    second = built_in(folder)
    assert isinstance(second, Path) and ctypes.CDLL(str(second)).answer() == 42
    assert compiled(folder) == ["a.cpp", "a.cpp", "b.cpp"]


def test_a_cache_of_another_user_is_not_used(
    folder: Path,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built_in(folder)
    monkeypatch.setattr(trust.os, "getuid", lambda: 12345)
    if folder.stat().st_uid == 0:  # root's would be trusted: see it as somebody else's
        monkeypatch.setattr(trust, "_ROOT", 54321)
    answer = built_in(folder)
    assert isinstance(answer, BuildError)
    assert str(answer).endswith("set DATAFLEX_CACHE to a folder of your own") and "belongs to another user" in str(
        answer
    )


def test_a_prebuilt_library_that_was_changed_is_not_loaded(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = CpuBuilder()
    site = tmp_path / "dataflex"
    (site / "_lib").mkdir(parents=True)
    (site / "ops" / "native").mkdir(parents=True)
    monkeypatch.setattr(_ext, "__file__", str(site / "ops" / "native" / "_ext.py"))
    library = site / "_lib" / builder.file_name()
    library.write_bytes(b"library")
    (site / "_lib" / "cpu.sources").write_text(builder.source_digest())
    trust.seal(library)
    assert _ext._prebuilt(builder) == library and not said
    plant(library)
    assert _ext._prebuilt(builder) is None
    assert said == [f"{library}: not loaded: it is not as it was built"]


def test_a_loose_umask_leaves_nothing_that_others_can_write(folder: Path) -> None:
    before = os.umask(0o002)
    try:
        first = built_in(folder)
    finally:
        os.umask(before)
    assert isinstance(first, Path) and _build.usable(first, folder / "cache")
