"""The runner's processes from start to end: signals passed on, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dataflex.utils.stopping import SAME_SIGNAL_S, SIGNALS
from dataflex.worker import prctl

GRACE_S = 35.0
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Ended:
    """How the runner ended: its exit code, and the signals that were sent to us meanwhile, in that order."""

    code: int = 0
    received: list[int] = field(default_factory=list)


def run(words: list[str], env: Mapping[str, str], here: Path, folder: Path) -> Ended:
    """Run the runner in the folder ``here``, and all that it started, to the end. folder: the launch folder."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    ended = Ended()
    runner = subprocess.Popen(words, env=env, cwd=here, start_new_session=True)
    with _forwarding(runner.pid, folder, ended.received):
        ended.code = runner.wait()
        _end_group(runner.pid, ended.received)
    return ended


@contextlib.contextmanager
def _forwarding(group: int, folder: Path, received: list[int]) -> Iterator[None]:
    """Pass the first signal that we get on to the workers; the second one kills all there is.

    What follows within `SAME_SIGNAL_S` is the first one again: ``timeout`` signals its child, and then its group.
    """
    first = 0.0

    def forward(number: int, _frame: object) -> None:
        nonlocal first
        now = time.monotonic()
        if not received:
            first = now
            received.append(number)
            _ask(group, folder, number)
        elif now - first >= SAME_SIGNAL_S:
            received.append(number)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask(group: int, folder: Path, number: int) -> None:
    """Signal each worker, or, as long as not all of them have started, the whole group with SIGTERM."""
    marks = [path.read_text(encoding="utf-8").split() for path in folder.glob("pid.*")]
    whole = bool(marks) and len(marks) == int(marks[0][1])
    for pid, _ in marks if whole else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), number)
    if not whole:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)


def _end_group(group: int, received: list[int]) -> None:
    """End what the runner left behind: nothing after a good run, orphaned workers after a killed launcher.

    Where a signal has asked the workers to end, they are given the time that they take; a second one kills them.
    """
    start, asked = time.monotonic(), False
    while _alive(group):
        if not received:
            with contextlib.suppress(ProcessLookupError):
                if not asked:
                    os.killpg(group, signal.SIGTERM)
                    asked = True
                elif time.monotonic() - start > GRACE_S:
                    os.killpg(group, signal.SIGKILL)
        time.sleep(0.05)


def _alive(group: int) -> bool:
    """Whether a process of the group still runs; those that have ended are reaped, as we are their reaper."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG) != (0, 0):
            pass
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
