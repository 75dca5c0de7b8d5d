"""Whether a disk has room for what is about to be written, said before it is begun and when it was not so."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dataflex.utils.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_room(folder: Path, wanted: int, what: str) -> None:
    """UserError naming the disk of ``folder`` where it has less than ``wanted`` bytes free for ``what``."""
    free = shutil.disk_usage(existing(folder)).free
    if free < wanted:
        raise UserError(
            f"{folder}: no room for {what}: it takes about {_mib(wanted)} MiB, the disk at {mount_of(folder)} has "
            f"{_mib(free)} MiB free; make room, or name another output_dir"
        )


@contextmanager
def said_when_full(folder: Path, what: str) -> Iterator[None]:
    """Inside, an error that comes of a full disk, whichever library words it, is a UserError that names the disk."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        if not full and "No space left on device" not in str(error) and shutil.disk_usage(existing(folder)).free > 0:
            raise
        raise UserError(
            f"{folder}: {what} could not be written: the disk at {mount_of(folder)} is full; the last good checkpoint "
            "is untouched"
        ) from error


def existing(folder: Path) -> Path:
    """``folder``, or the nearest folder above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def mount_of(folder: Path) -> Path:
    """Where the disk that holds ``folder`` is mounted."""
    place = existing(folder).resolve()
    while not place.is_mount():
        place = place.parent
    return place


def _mib(count: int) -> str:
    return f"{-(-count // (1 << 20)):,}"
