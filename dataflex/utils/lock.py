"""A folder held for as long as processes live: by the kernel's flock, or by a heartbeat file where there is none.

The kernel frees a lock when its last holder dies, however that happens. Some network file systems have no locks: there
the holder writes to a file every few seconds, and who finds that file unchanged for long enough takes it over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

LOCK, HEARTBEAT = ".dataflex.lock", ".dataflex.heartbeat"
WAIT_S = 5.0  # a run that was just killed may still be ending
BEAT_S = 5.0
DEAD_AFTER_S = 60.0
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_HELD: set[int] = set()


class FolderLock:
    """Made by `take` and `join`; `release` it, or die."""

    def __init__(self, file: int | None, beat: _Heartbeat | None = None) -> None:
        self._file, self._beat = file, beat

    @classmethod
    def take(cls, folder: Path, pid: int, wait_s: float = WAIT_S, key: str = "output_dir") -> FolderLock:
        """Hold ``folder``, which is made; UserError naming the holder where another does so for ``wait_s`` more.

        pid: of the process to name to others, who would end it to end the run. key: what names the folder to the user.
        """
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "pid": pid,
            "host": socket.gethostname(),
            "started": datetime.now().astimezone().isoformat(" ", "seconds"),
        }
        deadline = time.monotonic() + wait_s
        while True:
            try:
                file = _locked(folder / LOCK, json.dumps(record))
            except OSError as exc:
                if exc.errno not in _NO_LOCKS:
                    raise
                return cls(None, _Heartbeat.start_in(folder, record, key))
            if file is not None:
                return cls(file)
            if time.monotonic() >= deadline:
                raise _in_use(folder, _read(folder / LOCK), key)
            time.sleep(0.1)

    @classmethod
    def join(cls, folder: Path) -> FolderLock:
        """Hold ``folder`` together with the process of this run that took it, so that the last to die frees it."""
        try:
            file = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return cls(None)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(file)
            if exc.errno in _NO_LOCKS:
                return cls(None)
            raise
        return cls(_kept(file))

    def release(self, folder: Path, tidy: bool) -> None:
        """Let go. tidy: remove the file too, where no other process of the run holds the folder any more."""
        if self._beat is not None:
            self._beat.end()
        if self._file is not None:
            if tidy and _alone(self._file):
                (folder / LOCK).unlink(missing_ok=True)
            _HELD.discard(self._file)
            os.close(self._file)
            self._file = None


def _locked(path: Path, record: str) -> int | None:
    """The open and locked file, or None while another process holds it; OSError where files cannot be locked.

    Once it is ours alone the lock is made a shared one, for the run's other processes to join.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        current = os.stat(path).st_ino == os.fstat(file).st_ino  # else it was removed at the end of another run
        if current:
            os.ftruncate(file, 0)
            os.pwrite(file, record.encode(), 0)
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return _kept(file)
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(file)
        raise
    os.close(file)
    return None


def _alone(file: int) -> bool:
    """Whether the lock, which is being let go of, was held by nobody else; only then is it ours alone now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _kept(file: int) -> int:
    _HELD.add(file)
    return file


def _forget_in_child() -> None:
    """A forked helper that outlives its parent does not hold the folder."""
    for file in _HELD:
        with contextlib.suppress(OSError):
            os.close(file)
    _HELD.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class _Heartbeat(threading.Thread):
    """Rewrites its number in the heartbeat file until `end`; ends the process where another has taken the file."""

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        super().__init__(name="run lock", daemon=True)
        self.path, self.record = path, record
        self.ended = threading.Event()

    @classmethod
    def start_in(cls, folder: Path, record: Mapping[str, Any], key: str) -> _Heartbeat:
        """Make the file and keep it changing; UserError where another process does so."""
        path = folder / HEARTBEAT
        beat = cls(path, {**record, "holder": os.getpid(), "token": secrets.token_hex(8)})
        while True:
            try:
                with path.open("x", encoding="utf-8") as handle:
                    handle.write(beat._text(0))
            except FileExistsError:
                _take_over(folder, path, key)
                continue
            beat.start()
            return beat

    def _text(self, number: int) -> str:
        return json.dumps({**self.record, "beat": f"{number:012d}"})

    def run(self) -> None:
        number = 0
        while not self.ended.wait(BEAT_S):
            number += 1
            try:
                self._beat(number)
            except OSError as exc:  # a network file system that does not answer for a while
                logger.warning(f"{self.path}: {exc.strerror or exc}; tried again in {BEAT_S:g} s")

    def _beat(self, number: int) -> None:
        if _parsed(_content(self.path) or b"").get("token") != self.record["token"]:
            logger.error(f"{self.path}: another run has taken this folder over (was this one suspended?)")
            os._exit(1)
        with self.path.open("r+", encoding="utf-8") as handle:
            handle.write(self._text(number))
            handle.flush()
            os.fsync(handle.fileno())

    def end(self) -> None:
        self.ended.set()
        self.join()
        self.path.unlink(missing_ok=True)


def _take_over(folder: Path, path: Path, key: str) -> None:
    """Remove the heartbeat of a process that is gone; UserError where it still beats."""
    record, first = _read(path), _content(path)
    gone = record.get("host") == socket.gethostname() and not _lives(record.get("holder"))
    if not gone:
        logger.info(f"{path}: waiting up to {DEAD_AFTER_S:.0f} s to see whether its run still lives")
    deadline = time.monotonic() + DEAD_AFTER_S
    while not gone:
        time.sleep(min(1.0, BEAT_S))
        now = _content(path)
        if now is None:
            return
        if now != first:
            raise _in_use(folder, _read(path), key)
        gone = time.monotonic() >= deadline
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        path.rename(aside)
        aside.unlink()


def _lives(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _read(path: Path) -> dict[str, Any]:
    """What the file says of its holder; empty where it is not there or not (yet) readable."""
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return {}


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content.decode())
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _in_use(folder: Path, holder: Mapping[str, Any], key: str) -> UserError:
    who = "process {pid} on {host}, started {started}".format_map({"pid": "?", "host": "?", "started": "?", **holder})
    return UserError(
        f"{key}: {folder} is in use by another run ({who}); wait for its end, end it, or name another folder"
    )
