"""Whether a disk has room for what is about to be written, said before it is begun and when it was not so."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dataflex.utils.errors import UserError, brief

_FULL = (errno.ENOSPC, errno.EDQUOT)
_WORDS = ("No space left on device", "Disk quota exceeded")


def check_room(folder: Path, wanted: int, what: str) -> None:
    """UserError naming the disk of ``folder`` where it has less than ``wanted`` bytes free for ``what``."""
    free = shutil.disk_usage(existing(folder)).free
    if free < wanted:
        raise UserError(
            f"{folder}: no room for {what}: it takes about {_mib(wanted)} MiB, the disk at {mount_of(folder)} has "
            f"{_mib(free)} MiB free; make room, or name another output_dir"
        )


@contextmanager
def full_disk_said(places: Mapping[str, str]) -> Iterator[None]:
    """Inside, an error that comes of a full disk is a UserError that names the disk and what is free there.

    places: where things are written, by what the user knows them as; looked through where the error names no file.
    """
    try:
        yield
    except Exception as error:
        folders = {what: Path(place).expanduser() for what, place in places.items() if place}
        where = _full_place(error, folders)
        if where is None:
            raise
        what, folder = where
        free = shutil.disk_usage(existing(folder)).free
        raise UserError(
            f"{what}: the disk at {mount_of(folder)} is full, {_mib(free)} MiB are free ({brief(error)}); make room: "
            "the same command goes on from the last whole checkpoint"
        ) from error


def _full_place(error: BaseException, folders: Mapping[str, Path]) -> tuple[str, Path] | None:
    """What was written, and where, if ``error``, or what it came from, is of a full disk."""
    cause: BaseException | None = error
    while cause is not None and not _is_full(cause):
        cause = cause.__cause__ or cause.__context__
    if cause is None or isinstance(error, UserError):
        return None
    named = getattr(cause, "filename", None)
    if isinstance(named, str):
        return named, Path(named).absolute().parent
    what = min(folders, key=lambda key: shutil.disk_usage(existing(folders[key])).free)
    return what, folders[what]


def _is_full(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno in _FULL) or any(words in str(error) for words in _WORDS)


@contextmanager
def said_when_full(folder: Path, what: str) -> Iterator[None]:
    """Inside, an error that comes of a full disk, whichever library words it, is a UserError that names the disk."""
    try:
        yield
    except Exception as error:
        if not _is_full(error) and shutil.disk_usage(existing(folder)).free > 0:
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
