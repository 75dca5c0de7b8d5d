"""One run at a time in a folder: every process of a run holds it, and the last one's end frees it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.launch_folder import launcher_pid
from dataflex.utils.lock import FolderLock
from dataflex.utils.stopping import Stopped


@contextmanager
def held(folder: Path, key: str = "output_dir") -> Iterator[None]:
    """Hold ``folder`` inside; a collective. UserError where another run holds it, or it cannot be written to.

    key: of the configuration, which names it.
    """
    lock = dist.together(lambda: _take(folder, key) if dist.is_main() else None)
    lock = lock or FolderLock.join(folder)
    tidy = False
    try:
        yield
        tidy = True
    except (Stopped, UserError):
        tidy = True
        raise
    finally:
        lock.release(folder, tidy)


def _take(folder: Path, key: str) -> FolderLock:
    try:
        return FolderLock.take(folder, launcher_pid() or os.getpid(), key=key)
    except OSError as exc:
        raise UserError(f"{key}: cannot write to '{folder}': {exc.strerror or exc}") from None
