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
    workers = Workers(folder)
    with _forwarding(runner.pid, workers, ended.received):
        while not workers.pids():
            with contextlib.suppress(subprocess.TimeoutExpired):
                ended.code = runner.wait(0.5)
                break
        ended.code = runner.wait()
        _end_group(runner.pid, ended.received)
    return ended


class Workers:
    """The workers of this machine, by their marks in the launch folder, which are no longer needed once they are read.

    A folder among the temporary ones may be cleaned up while the run lasts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: list[int] = []

    def pids(self) -> list[int]:
        """Their process ids, once all of them have started; before that, none."""
        if not self.found:
            marks = [path.read_text(encoding="utf-8").split() for path in self.folder.glob("pid.*")]
            if marks and len(marks) == int(marks[0][1]):
                self.found = [int(pid) for pid, _ in marks]
        return self.found


@contextlib.contextmanager
def _forwarding(group: int, workers: Workers, received: list[int]) -> Iterator[None]:
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
            _ask(group, workers, number)
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


def _ask(group: int, workers: Workers, number: int) -> None:
    """Signal each worker, or, as long as not all of them have started, the whole group with SIGTERM."""
    pids = workers.pids()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    if not pids:
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
