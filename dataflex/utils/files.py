"""Files and folders that are either whole or not there, and hashes of files."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

_REMOVING = ".removing-"


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) through a temporary file, fsync and rename; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there. A folder is gone at once, whenever the process ends.

    It first gets a hidden name that means nothing to anybody; what is left under such a name `finish_removals` removes.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    hidden = path.with_name(_REMOVING + path.name)
    if hidden.exists():
        shutil.rmtree(hidden)
    path.rename(hidden)
    shutil.rmtree(hidden)


def finish_removals(folder: Path) -> None:
    """Remove what a process that ended inside `remove` left in ``folder``."""
    for hidden in folder.glob(f"{_REMOVING}*"):
        shutil.rmtree(hidden)


def sha256_of(path: Path) -> str:
    """Hash of a file's content, in hexadecimal; read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
