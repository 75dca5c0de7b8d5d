"""The build cache with a tiny library: keys, one build for many processes, kills, failures, changes meanwhile."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataflex.ops.native._build import FAILURE_KEPT_S, BuildError, Library, Unit, obtain
from tests.processes import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
# A compiler that logs what it compiles and can be told to wait or to fail on a source.
COMPILER = """#!/bin/sh
for word in "$@"; do case "$word" in
  *.cpp)
    echo "$word" >> {folder}/compiled
    while [ -e {folder}/wait-$(basename "$word") ]; do sleep 0.1; done
    if [ -e {folder}/fail-$(basename "$word") ]; then
      cat {folder}/fail-$(basename "$word") >&2
      echo "$word:3: error: no such thing" >&2; exit 1
    fi;;
esac; done
exec g++ "$@"
"""
PROCESS = """
import sys
from pathlib import Path
from tests.native.test_build import built_in
print(built_in(Path(sys.argv[1])))
"""


def library_in(folder: Path) -> Library:
    include = (folder / "src" / "include",)
    compiler = str(folder / "cc")
    units = tuple(
        Unit(path, (compiler, "-fPIC", f"-I{include[0]}"), include) for path in sorted((folder / "src").glob("*.cpp"))
    )
    return Library("libtiny.so", folder / "src", units, (compiler, "-shared"), (), "compiler 1")


def built_in(folder: Path) -> Path | BuildError:
    return obtain([library_in(folder)], folder / "cache")["libtiny.so"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cc").write_text(COMPILER.format(folder=tmp_path))
    (tmp_path / "cc").chmod(0o755)
    (tmp_path / "src" / "include").mkdir(parents=True)
    (tmp_path / "src" / "include" / "answer.h").write_text("#define ANSWER 42\n")
    (tmp_path / "src" / "include" / "unused.h").write_text("")
    (tmp_path / "src" / "a.cpp").write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    (tmp_path / "src" / "b.cpp").write_text('extern "C" int other() { return 1; }\n')
    return tmp_path


def compiled(folder: Path) -> list[str]:
    log = folder / "compiled"
    return sorted(Path(line).name for line in log.read_text().split()) if log.exists() else []


def start(folder: Path) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROCESS, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT, start_new_session=True)


def until(condition: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_a_library_is_built_once_and_again_when_what_it_includes_changes(folder: Path) -> None:
    first = built_in(folder)
    assert isinstance(first, Path) and ctypes.CDLL(str(first)).answer() == 42
    (folder / "src" / "include" / "unused.h").write_text("// another text")
    assert built_in(folder) == first and compiled(folder) == ["a.cpp", "b.cpp"]
    (folder / "src" / "include" / "answer.h").write_text("#define ANSWER 43\n")
    second = built_in(folder)
    assert isinstance(second, Path) and ctypes.CDLL(str(second)).answer() == 43
    assert compiled(folder) == ["a.cpp", "a.cpp", "b.cpp"]


def test_flags_and_compiler_versions_are_part_of_the_key(folder: Path) -> None:
    library = library_in(folder)
    faster = tuple(Unit(u.source, (*u.command, "-O3"), u.include_paths) for u in library.units)
    others = [
        Library("libtiny.so", library.root, faster, library.link, (), library.identity),
        Library("libtiny.so", library.root, library.units, (*library.link, "-s"), (), library.identity),
        Library("libtiny.so", library.root, library.units, library.link, (), "compiler 2"),
    ]
    assert len({library.key(), *(other.key() for other in others)}) == 4
    assert library.key() == library_in(folder).key()


def test_processes_that_start_at_once_build_once(folder: Path) -> None:
    (folder / "wait-a.cpp").touch()
    processes = [start(folder) for _ in range(3)]
    until(lambda: "a.cpp" in compiled(folder))
    time.sleep(1.0)
    (folder / "wait-a.cpp").unlink()
    paths = {process.communicate(timeout=PATIENCE_S)[0] for process in processes}
    assert len(paths) == 1 and "libtiny.so" in paths.pop()
    assert compiled(folder) == ["a.cpp", "b.cpp"]


def test_a_killed_build_is_taken_up_by_the_next_start(folder: Path) -> None:
    (folder / "wait-b.cpp").touch()
    victim = start(folder)
    until(lambda: list((folder / "cache" / "objects").glob("a-*.o")) and "b.cpp" in compiled(folder))
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    assert list((folder / "cache").glob(".building-*"))
    begin = time.monotonic()
    survivor = start(folder)  # the victim's compiler is still there, waiting
    until(lambda: compiled(folder).count("b.cpp") == 2)
    (folder / "wait-b.cpp").unlink()
    assert "libtiny.so" in survivor.communicate(timeout=PATIENCE_S)[0]
    assert time.monotonic() - begin < 30
    assert compiled(folder) == ["a.cpp", "b.cpp", "b.cpp"], "the whole object of the killed build is kept"
    assert not list((folder / "cache").glob(".building-*"))


def test_a_failed_build_says_the_compilers_error_once_for_all_who_waited(folder: Path) -> None:
    (folder / "wait-a.cpp").touch()
    (folder / "fail-a.cpp").touch()
    processes = [start(folder) for _ in range(2)]
    until(lambda: "a.cpp" in compiled(folder))
    time.sleep(1.0)
    (folder / "wait-a.cpp").unlink()
    texts = {process.communicate(timeout=PATIENCE_S)[0] for process in processes}
    (text,) = texts
    assert text.count("\n") == 1 and "a.cpp:3: error: no such thing (log: " in text
    assert compiled(folder).count("a.cpp") == 1
    (folder / "fail-a.cpp").unlink()
    assert str(built_in(folder)) == text.strip(), "a later start does not try the same again"
    assert compiled(folder).count("a.cpp") == 1 and "removed" in text
    (failure,) = (folder / "cache").glob("*/libtiny.failed")
    os.utime(failure, (time.time() - FAILURE_KEPT_S - 60,) * 2)
    assert isinstance(built_in(folder), Path), "but after a day it does"


def test_a_failure_of_the_machine_is_not_remembered(folder: Path) -> None:
    (folder / "fail-a.cpp").write_text("No space left on device\n")
    assert "no such thing" in str(built_in(folder))
    (folder / "fail-a.cpp").unlink()
    assert isinstance(built_in(folder), Path)


def test_sources_that_change_while_they_are_built_are_not_kept(folder: Path) -> None:
    (folder / "wait-a.cpp").touch()
    process = start(folder)
    until(lambda: "a.cpp" in compiled(folder))
    (folder / "src" / "include" / "answer.h").write_text("#define ANSWER 44\n")
    (folder / "wait-a.cpp").unlink()
    assert process.communicate(timeout=PATIENCE_S)[0] == "the sources changed while they were built: start again\n"
    (folder / "src" / "include" / "answer.h").write_text("#define ANSWER 42\n")
    built = built_in(folder)
    assert isinstance(built, Path) and ctypes.CDLL(str(built)).answer() == 42
