"""One holder at a time: refused in one line while it lives, free at its death, by flock and by heartbeat."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataflex.utils import lock
from dataflex.utils.errors import UserError
from dataflex.utils.lock import HEARTBEAT, LOCK, FolderLock
from dataflex.utils.run_lock import held
from tests.distributed import ROOT

HOLD = """
import sys, time
from pathlib import Path
from dataflex.utils.lock import FolderLock
held = {held}
print("held", flush=True)
time.sleep(60)
"""
TAKE, JOIN = "FolderLock.take(Path(sys.argv[1]), 4711)", "FolderLock.join(Path(sys.argv[1]))"


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system without locks; beats are quick."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "DEAD_AFTER_S", 0.5)


def hold(folder: Path, how: str = TAKE) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", HOLD.format(held=how), str(folder)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        FolderLock.take(folder, 1, wait_s=0.2)
    return str(caught.value)


def test_a_second_holder_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with hold(folder) as process:
        line = rf"output_dir: {folder} is in use by another run \(process 4711 on {socket.gethostname()}, started "
        assert re.fullmatch(line + r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d\); wait for .*", refused(folder))
        process.kill()
    FolderLock.take(folder, 1, wait_s=0).release(folder, tidy=True)
    assert not list(folder.iterdir())


def test_the_folder_is_held_as_long_as_one_of_the_run_lives(tmp_path: Path) -> None:
    mine = FolderLock.take(tmp_path, 1)
    with hold(tmp_path, JOIN) as other:
        mine.release(tmp_path, tidy=False)
        assert "in use by another run (process 1 on" in refused(tmp_path)
        other.kill()
    FolderLock.take(tmp_path, 1, wait_s=0).release(tmp_path, tidy=True)


def test_a_run_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    with hold(tmp_path) as process:
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {process.pid}"]).wait()
        FolderLock.take(tmp_path, 1, wait_s=5).release(tmp_path, tidy=True)


def test_a_forked_helper_does_not_hold_the_folder(tmp_path: Path) -> None:
    mine = FolderLock.take(tmp_path, 1)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    mine.release(tmp_path, tidy=False)
    FolderLock.take(tmp_path, 2, wait_s=5).release(tmp_path, tidy=True)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, why in ((tmp_path / "file/out", "Not a directory"), (tmp_path / ("x" * 300), "File name too long")):
        with pytest.raises(UserError, match=f"^output_dir: cannot write to '{folder}': {why}$"), held(folder):
            pytest.fail("held")


def test_what_an_unreadable_lock_file_says_is_not_needed(tmp_path: Path) -> None:
    with hold(tmp_path) as process:
        (tmp_path / LOCK).write_bytes(b"\xff[")
        assert "in use by another run (process ? on ?, started ?)" in refused(tmp_path)
        process.kill()


def test_a_heartbeat_holds_where_there_are_no_locks(tmp_path: Path, no_flock: None) -> None:
    mine = FolderLock.take(tmp_path, 4711)
    assert "in use by another run (process 4711 on" in refused(tmp_path)
    mine.release(tmp_path, tidy=True)
    FolderLock.take(tmp_path, 1).release(tmp_path, tidy=True)
    assert not list(tmp_path.glob(f"{HEARTBEAT}*"))


@pytest.mark.parametrize("holder", ["here", "elsewhere", "garbage"])
def test_a_heartbeat_that_has_stopped_is_taken_over(tmp_path: Path, no_flock: None, holder: str) -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    host = socket.gethostname() if holder == "here" else "another"
    text = json.dumps({"pid": 1, "host": host, "started": "long ago", "holder": gone.pid, "token": "x", "beat": "9"})
    (tmp_path / HEARTBEAT).write_text("{" if holder == "garbage" else text)
    start = time.monotonic()
    FolderLock.take(tmp_path, 1).release(tmp_path, tidy=True)
    assert time.monotonic() - start < 0.4 or holder != "here", "a dead process of this machine is not waited for"
    assert time.monotonic() - start > 0.4 or holder == "here"


def test_who_was_suspended_ends_when_another_has_taken_over(tmp_path: Path) -> None:
    program = (
        "import errno, fcntl, sys, time\nfrom pathlib import Path\nfrom dataflex.utils import lock\n"
        "def refuse(*_):\n    raise OSError(errno.ENOLCK, 'no')\n"
        "fcntl.flock = refuse\nlock.BEAT_S = 0.05\n"
        "lock.FolderLock.take(Path(sys.argv[1]), 1)\nprint('held', flush=True)\ntime.sleep(60)\n"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        (tmp_path / HEARTBEAT).write_text(json.dumps({"token": "another"}))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "another run has taken this folder over" in errors
    assert json.loads((tmp_path / HEARTBEAT).read_text()) == {"token": "another"}


def test_the_lock_file_stays_until_the_last_of_the_run_lets_go(tmp_path: Path) -> None:
    """Else another run could make a new one while this one's other processes still write."""
    mine = FolderLock.take(tmp_path, 1)
    with hold(tmp_path, JOIN) as other:
        mine.release(tmp_path, tidy=True)
        assert "in use by another run (process 1 on" in refused(tmp_path)
        other.kill()


def test_a_heartbeat_outlives_a_file_system_that_does_not_answer(
    tmp_path: Path, no_flock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, ended = lock._content, []
    monkeypatch.setattr("os._exit", ended.append)
    mine = FolderLock.take(tmp_path, 1)

    def fail(path: Path) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(lock, "_content", fail)
    time.sleep(0.2)
    monkeypatch.setattr(lock, "_content", read)
    before = (tmp_path / HEARTBEAT).read_text()
    time.sleep(0.3)
    assert (tmp_path / HEARTBEAT).read_text() > before and not ended, "it beats again"
    mine.release(tmp_path, tidy=True)
