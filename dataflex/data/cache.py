"""Tables of rows that are made once: kept as Arrow files beside a sealed manifest, checked before they are mapped.

An entry is a folder with ``*.arrow`` and, written last, `MANIFEST`: the fingerprint and every file's size and sha256.
What is not as it was written is never opened, since a damaged Arrow file can end the process.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger
from dataflex.utils.records import DamagedError, FileRecord, InnerPath, Record, read_sealed, write_sealed

if TYPE_CHECKING:
    from datasets import Dataset

DAY_S = 24 * 3600
MANIFEST = "dataflex_tokenized.json"
Make = Callable[[Path], "Dataset"]
"""Makes a dataset whose files lie in a new folder."""


class Entry(Record):
    """made_from: the parts of the fingerprint, by name, for what says which of them changed."""

    fingerprint: str
    made_from: dict[str, str]
    files: dict[InnerPath, FileRecord]


def cached(fingerprint: str, make: Make, overwrite: bool = False) -> Dataset:
    """The dataset of ``fingerprint`` from the user's cache of `datasets`; made, and kept there, where it is not whole.

    overwrite: make it anew in any case.
    """
    import datasets

    parent = Path(datasets.config.HF_DATASETS_CACHE) / "dataflex"
    folder = parent / fingerprint
    if not overwrite and folder.exists():
        try:
            return opened(folder, read_entry(folder))
        except DamagedError as problem:
            logger.warning(f"{folder}: the cache is made anew: {problem}")
    with _writable(parent, "set HF_DATASETS_CACHE to a folder that can be written"):
        return store(folder, make, fingerprint)


def read_entry(folder: Path) -> Entry:
    """The manifest of an entry. DamagedError where there is none that can be used."""
    return read_sealed(folder / MANIFEST, Entry)


def opened(folder: Path, entry: Entry) -> Dataset:
    """The dataset of an entry, memory-mapped. DamagedError where a file is not as it was written; reads all of them."""
    import pyarrow as pa
    from datasets import Dataset, concatenate_datasets

    for name, record in sorted(entry.files.items()):
        problem = record.differs(folder / name)
        if problem:
            raise DamagedError(problem)
    if not entry.files:
        raise DamagedError(f"{MANIFEST} names no file")
    try:
        parts = [Dataset.from_file(str(folder / name)) for name in sorted(entry.files)]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DamagedError(f"cannot be opened ({type(error).__name__})") from None
    dataset = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    dataset._fingerprint = entry.fingerprint
    return dataset


def store(folder: Path, make: Make, fingerprint: str, made_from: dict[str, str] | None = None) -> Dataset:
    """Make a dataset, keep it as the entry ``folder`` in place of what was there, and open it.

    Everything is written beside ``folder`` first; a process that is killed leaves nothing that counts.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    before = _inode(folder)
    for left in folder.parent.glob(f".{folder.name}-*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > DAY_S:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True) as made:
        partial, work = Path(made) / "entry", Path(made) / "work"
        partial.mkdir()
        work.mkdir()
        dataset = make(work)
        files = {}
        for number, file in enumerate(dataset.cache_files):
            name = f"{number:05d}.arrow"
            os.replace(file["filename"], partial / name)
            files[name] = FileRecord.of(partial / name)
        entry = Entry(fingerprint=fingerprint, made_from=made_from or {}, files=files)
        write_sealed(partial / MANIFEST, entry.model_dump())
        if before is not None and _inode(folder) == before:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(partial, folder)
        except OSError:  # another process has just made the same
            if not (folder / MANIFEST).exists():
                raise
    return opened(folder, read_entry(folder))


def _inode(folder: Path) -> int | None:
    """What tells one folder of this name from another; None where there is none."""
    return folder.stat().st_ino if folder.exists() else None


@contextmanager
def _writable(folder: Path, remedy: str) -> Iterator[None]:
    """Inside, what cannot be written is a UserError naming ``folder``, what was missing and the remedy."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{folder}: the cache cannot be written: {error.strerror or error}; {remedy}") from None


def cause_of(error: BaseException) -> BaseException:
    """The UserError or OSError that another library's error wraps, else the error itself."""
    cause: Any = error
    while cause is not None and not isinstance(cause, UserError | OSError):
        cause = cause.__cause__ or cause.__context__
    return error if cause is None else cause
