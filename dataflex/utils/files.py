"""Files and folders that are either whole or not there, and hashes of files."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

_REMOVING = ".removing-"
BLOCK = 64 << 10
LONGEST_NAME, LONGEST_PATH = 255, 4000  # bytes; Linux allows 4,096, and something is added to most paths


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


def sample_digest(path: Path, budget: int) -> str:
    """Hash of a file's size and content, in hexadecimal; of content beyond ``budget`` bytes, evenly spaced blocks.

    The first and the last block are always among them.
    """
    size = path.stat().st_size
    if size <= budget:
        return sha256_of(path)
    count = max(2, budget // BLOCK)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as handle:
        for number in range(count):
            handle.seek((size - BLOCK) * number // (count - 1))
            digest.update(handle.read(BLOCK))
    return digest.hexdigest()


def unusable_path(text: str) -> str | None:
    """Why nothing on a disk can have this path, or None if something could."""
    if "\0" in text:
        return "it has a zero byte"
    if text.startswith("~") and os.path.expanduser(text).startswith("~"):
        return "there is no such user"
    data = text.encode("utf-8", "replace")
    longest = max(data.split(b"/"), key=len)
    if len(longest) > LONGEST_NAME:
        return f"a name in it has {len(longest):,} bytes, files can have {LONGEST_NAME}"
    return f"it has {len(data):,} bytes, paths can have {LONGEST_PATH:,}" if len(data) > LONGEST_PATH else None


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; none where it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def give_usual_mode(path: Path) -> None:
    """Let others read a file as far as the umask allows: some libraries write theirs for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def sha256_of(path: Path) -> str:
    """Hash of a file's content, in hexadecimal; read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
