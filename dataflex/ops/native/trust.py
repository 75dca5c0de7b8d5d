"""Whether a built library may be loaded: it is this user's or root's, nobody else can write it, it is as it was built.

Beside every library (and object) lies ``<name>.sha256`` with its hash. Loading a library runs code, so what does not
fit is built anew, and a cache that belongs to somebody else is not used at all.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dataflex.utils.files import sha256_of, write_atomically

_ROOT = 0
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def hash_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def seal(path: Path) -> None:
    """Record the hash of a file that was just built, and let nobody else write it."""
    write_atomically(hash_file(path), sha256_of(path) + "\n")
    for file in (path, hash_file(path)):
        file.chmod(stat.S_IMODE(file.stat().st_mode) & ~_OTHERS_WRITE)


def altered(path: Path) -> str | None:
    """Why a file is not what was built, by its recorded hash; None if it is."""
    try:
        recorded = hash_file(path).read_text(encoding="ascii").split()
        return None if recorded[:1] == [sha256_of(path)] else "it is not as it was built"
    except (OSError, ValueError) as error:
        return f"its hash cannot be read ({type(error).__name__})"


def distrusted(path: Path, cache: Path) -> str | None:
    """Why the library ``path`` in the folder ``cache`` must not be loaded, or None if it may be."""
    folders = [cache, *(p for p in path.parents if cache in p.parents)]
    for place in (*folders, path, hash_file(path)):
        problem = _open_to_others(place)
        if problem:
            return f"{place.name} {problem}"
    return altered(path)


def own(folder: Path) -> str | None:
    """Make ``folder`` where it is missing, one that nobody else can write; why that cannot be, or None.

    What was built in one that others could write is removed: it may be theirs. OSError where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    info = folder.stat()
    if info.st_uid not in (os.getuid(), _ROOT):
        return f"{folder} belongs to another user (uid {info.st_uid}): set DATAFLEX_CACHE to a folder of your own"
    if info.st_mode & _OTHERS_WRITE:
        folder.chmod(stat.S_IMODE(info.st_mode) & ~_OTHERS_WRITE)
        for built in (path for suffix in ("*.so", "*.o") for path in folder.rglob(suffix)):
            built.unlink(missing_ok=True)
    return None


def _open_to_others(path: Path) -> str | None:
    try:
        info = path.stat()
    except OSError:
        return "is missing"
    if info.st_uid not in (os.getuid(), _ROOT):
        return f"belongs to another user (uid {info.st_uid})"
    return "can be written by others" if info.st_mode & _OTHERS_WRITE else None
