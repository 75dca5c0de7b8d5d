"""How libraries are built: keyed by content, by ninja, in a private folder, under a lock that dies with its holder.

A library's key covers its sources, the headers that they include, every command, and the versions of compilers and
torch. Under the key's lock (flock: the kernel frees it when the holder is killed) missing objects are compiled and
renamed into ``objects/``, then the library is linked and renamed into place. A killed build therefore leaves whole
objects, which the next start keeps, and a private folder, which it removes. Nobody reads half a file.
A build that failed is remembered under its key, beside the log: no later process tries it again for a day.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataflex.ops.native import trust
from dataflex.utils.logging import logger

LOCK_TIMEOUT_S = 1800.0
FAILURE_KEPT_S = 24 * 3600.0
# Failures of the machine, not of the sources: the next process may well succeed.
_PASSING = re.compile("killed|no space left|cannot allocate|out of memory", re.IGNORECASE)
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


class BuildError(RuntimeError):
    """Why a library could not be built: one line."""


@dataclass(frozen=True)
class Unit:
    """One source and the command that compiles it, but for ``-c source -o object``."""

    source: Path
    command: tuple[str, ...]
    include_paths: tuple[Path, ...] = ()

    def key(self, root: Path) -> str:
        digest = hashlib.sha256(shlex.join(self.command).replace(str(root), "").encode())
        for path in included(self.source, self.include_paths):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()[:24]


@dataclass(frozen=True)
class Library:
    """A shared library: its file name, units and link command (objects and ``-o`` are added)."""

    file_name: str
    root: Path
    units: tuple[Unit, ...]
    link: tuple[str, ...]
    link_libraries: tuple[str, ...]
    identity: str

    def objects(self) -> dict[str, Unit]:
        """Object file name -> unit."""
        stamp = hashlib.sha256(self.identity.encode()).hexdigest()[:8]
        return {f"{unit.source.stem}-{stamp}-{unit.key(self.root)}.o": unit for unit in self.units}

    def key(self) -> str:
        parts = [*sorted(self.objects()), *self.link, *self.link_libraries]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def included(source: Path, include_paths: Sequence[Path]) -> list[Path]:
    """``source`` and the files that it includes by ``#include "..."``, all the way down, sorted."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop()
        found.add(path)
        for name in _INCLUDE.findall(path.read_text(encoding="utf-8")):
            places = (Path(os.path.normpath(folder / name)) for folder in (path.parent, *include_paths))
            target = next((place for place in places if place.is_file()), None)
            if target is not None and target not in found:
                waiting.append(target)
    return sorted(found)


def obtain(
    libraries: Sequence[Library], cache: Path, announce: Callable[[], None] = lambda: None
) -> dict[str, Path | BuildError]:
    """The built file of each library, from the cache or built now together; by file name.

    ``announce`` is called before a build. OSError where the cache cannot be written.
    """
    places = {library.file_name: cache / library.key() / library.file_name for library in libraries}
    missing = [library for library in libraries if not usable(places[library.file_name], cache)]
    errors: dict[str, BuildError] = {}
    if missing:
        started = time.time()
        for folder in (cache, cache / "objects", *{places[library.file_name].parent for library in missing}):
            foreign = trust.own(folder)
            if foreign:
                return {name: BuildError(foreign) for name in places}
        failures = {library.file_name: _remembered(places[library.file_name]) for library in missing}
        errors = {name: failure for name, failure in failures.items() if failure is not None}
        missing = [library for library in missing if library.file_name not in errors]
    if missing:
        announce()
        with _lock(places[missing[0].file_name].with_suffix(".lock")):
            errors |= _build([x for x in missing if not usable(places[x.file_name], cache)], places, cache, started)
    return {name: errors.get(name, place) for name, place in places.items()}


def _remembered(place: Path) -> BuildError | None:
    """Why the same build failed before, unless that is long ago or may have passed."""
    failure = place.with_suffix(".failed")
    if not failure.is_file() or time.time() - failure.stat().st_mtime > FAILURE_KEPT_S:
        return None
    passing = _PASSING.search(place.with_suffix(".log").read_text())
    return None if passing else BuildError(failure.read_text())


def usable(place: Path, cache: Path) -> bool:
    """Whether a library is there and may be loaded; what is there and may not be is said."""
    if not place.is_file():
        return False
    problem = trust.distrusted(place, cache)
    if problem:
        logger.warning("%s: not loaded, built anew: %s", place, problem)
    return problem is None


def _build(libraries: Sequence[Library], places: dict[str, Path], cache: Path, started: float) -> dict[str, BuildError]:
    """Build under the lock. What another process failed to build while this one waited is not tried again."""
    errors: dict[str, BuildError] = {}
    wanted = []
    for library in libraries:
        failure = places[library.file_name].with_suffix(".failed")
        if failure.is_file() and failure.stat().st_mtime > started:
            errors[library.file_name] = BuildError(failure.read_text())
        else:
            wanted.append(library)
    if not wanted:
        return errors
    prefix = f".building-{places[wanted[0].file_name].parent.name}-"
    for orphan in cache.glob(f"{prefix}*"):
        shutil.rmtree(orphan, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=prefix) as folder:
        work = Path(folder)
        (work / "build.ninja").write_text(_ninja_file(wanted, cache / "objects"))
        before = {library.file_name: set(library.objects()) for library in wanted}
        output = _run_ninja(work)
        for library in wanted:
            place = places[library.file_name]
            changed = before[library.file_name] ^ set(library.objects())
            if changed:
                for name in changed:
                    (cache / "objects" / name).unlink(missing_ok=True)
                errors[library.file_name] = BuildError("the sources changed while they were built: start again")
                continue
            if (work / library.file_name).is_file():
                trust.seal(work / library.file_name)
                os.replace(trust.hash_file(work / library.file_name), trust.hash_file(place))
                os.replace(work / library.file_name, place)
                continue
            log = place.with_suffix(".log")
            log.write_text(output)
            failure = place.with_suffix(".failed")
            again = f"tried again in a day, or once {failure.name} beside it is removed"
            errors[library.file_name] = BuildError(f"{_first_error(library, output)} (log: {log}; {again})")
            failure.write_text(str(errors[library.file_name]))
    return errors


def _ninja_file(libraries: Sequence[Library], objects: Path) -> str:
    def escape(text: str) -> str:
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    seal = "sha256sum < $part > $part.sha256 && mv -f $part.sha256 $out.sha256"
    lines = ["rule compile", f"  command = $run -c $in -o $part && {seal} && mv -f $part $out", "  description = $in"]
    lines += ["rule link", "  command = $run -o $part $in $libraries && mv -f $part $out", "  description = $out"]
    written: set[str] = set()
    for library in libraries:
        names = library.objects()
        for name, unit in names.items():
            whole = (objects / name).is_file() and trust.altered(objects / name) is None
            if name not in written and not whole:
                (objects / name).unlink(missing_ok=True)
                command = shlex.join(unit.command).replace("$", "$$")
                lines.append(f"build {escape(str(objects / name))}: compile {escape(str(unit.source))}")
                lines += [f"  run = {command}", f"  part = {name}"]
            written.add(name)
        inputs = " ".join(escape(str(objects / name)) for name in names)
        lines.append(f"build {escape(library.file_name)}: link {inputs}")
        lines += [f"  run = {shlex.join(library.link)}", f"  part = {library.file_name}.part"]
        lines.append(f"  libraries = {shlex.join(library.link_libraries)}")
    return "\n".join(lines) + "\n"


def _run_ninja(work: Path) -> str:
    """Ninja's output; whether it made the files is for the caller to see."""
    import ninja

    program = Path(ninja.BIN_DIR) / "ninja"
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    command = [str(program), "-C", str(work), "-k", "0", "-j", jobs]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    return result.stdout


def _first_error(library: Library, output: str) -> str:
    """One line on why ``library`` failed: the compiler's first error in one of its units, or what ended."""
    names = {*library.objects(), library.file_name}
    for block in re.split(r"^FAILED: ", output, flags=re.MULTILINE)[1:]:
        head, _, rest = block.partition("\n")
        if not any(name in head for name in names):
            continue
        command, _, message = rest.partition("\n")
        lines = [line.strip() for line in message.splitlines() if line.strip() and not line.startswith(("ninja:", "["))]
        telling = [line for line in lines if re.search(r"\berror\b|undefined|cannot|not found", line, re.IGNORECASE)]
        return (telling or lines or [f"`{shlex.split(command)[0]}` ended with an error and no message"])[0]
    return (output.strip().splitlines() or ["ninja wrote nothing"])[-1]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold ``path`` alone. A dead holder's lock is free; a living one is waited for at most LOCK_TIMEOUT_S."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    with path.open("w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(f"another process has held {path} for {LOCK_TIMEOUT_S:.0f} s") from None
                time.sleep(0.1)
        yield
