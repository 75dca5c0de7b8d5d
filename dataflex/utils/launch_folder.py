"""The folder through which a run's launcher and its workers on one machine speak: small files, each whole or not there.

``alive`` is locked by the launcher for as long as it lives. A worker leaves ``pid.<rank>`` when it starts, and at its
end ``error.<rank>`` (bad input, with the lines to print), ``hung.<rank>`` (others did not come, with a line to print),
``lost.<rank>`` (another one is gone, with a line that says which), ``failed.<rank>`` (an error of its own),
``stopped.<rank>`` (ended on request) or ``done.<rank>``. What cleans up temporary files may remove the folder while a
long run lasts: who has seen it once makes it again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import IO

LAUNCH_DIR = "DATAFLEX_LAUNCH_DIR"
_ALIVE = "alive"
_SEEN: set[str] = set()


def launch_folder() -> Path | None:
    """The folder of our launcher; None where another one started this process, or on another machine."""
    named = os.environ.get(LAUNCH_DIR)
    if named is None or not (named in _SEEN or Path(named).is_dir()):
        return None
    _SEEN.add(named)
    return Path(named)


def mark(kind: str, text: str) -> None:
    """Leave ``<kind>.<rank>`` for the launcher, where there is one."""
    folder = launch_folder()
    if folder is None:
        return
    folder.mkdir(exist_ok=True)
    name = f"{kind}.{os.environ.get('RANK', '0')}"
    partial = folder / f"partial.{name}"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / name)


def show_life(folder: Path) -> IO[str]:
    """The launcher's part: a locked file with its process id and group, to be kept open."""
    handle = (folder / _ALIVE).open("w", encoding="utf-8")
    handle.write(f"{os.getpid()} {os.getpgrp()}")
    handle.flush()
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # a file system without locks: the workers end with DeepSpeed's launch.py only
        (folder / _ALIVE).unlink()
    return handle


def launcher_pid() -> int | None:
    """The process id of our launcher, where it started this process."""
    folder = launch_folder()
    if folder is None or not (folder / _ALIVE).is_file():
        return None
    return int((folder / _ALIVE).read_text(encoding="utf-8").split()[0])


def end_with_launcher() -> None:
    """Have a thread kill this process's whole group, which the launcher made for the run, as soon as it is gone."""
    folder = launch_folder()
    if folder is None or not (folder / _ALIVE).is_file():
        return
    handle = (folder / _ALIVE).open(encoding="utf-8")
    group = int(handle.read().split()[1])
    if group != os.getpgrp():
        threading.Thread(target=_wait_and_end, args=(handle, folder), name="launcher's life", daemon=True).start()


def _wait_and_end(handle: IO[str], folder: Path) -> None:
    fcntl.flock(handle, fcntl.LOCK_SH)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)
