"""What signals and max_hours make of a run: votes, verdicts, and ends at once; no engine in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from dataflex.utils import stopping
from dataflex.utils.stopping import Stop
from tests.distributed import ROOT
from tests.processes import PATIENCE_S

BODY = """
import ctypes, os, sys
from dataflex.utils import stopping
stopping.SAME_SIGNAL_S = 0.3
stop = stopping.Stop(heeds=True, grace_s=float(sys.argv[1]))
stop.heed()
print("ready", flush=True)
left = 6
while left:
    left = ctypes.CDLL(None).sleep(left)  # native code, as a collective is
print("went on", stop.vote(2), flush=True)
os._exit(0)
"""


def waiting(*signals: tuple[float, signal.Signals], grace_s: float = 60) -> tuple[int, str]:
    """Exit code and output of a process that is in native code, after these signals (each after so many seconds)."""
    words = [sys.executable, "-c", BODY, str(grace_s)]
    env = os.environ | {"RANK": "0"}
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(words, cwd=ROOT, env=env, text=True, **out) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "ready\n"
        for wait_s, number in signals:
            time.sleep(wait_s)
            process.send_signal(number)
        text = process.communicate(timeout=PATIENCE_S)[0]
    return process.returncode, text


def voted(stop: Stop, number: signal.Signals | None = None, world: int = 4) -> int:
    """The vote once the listener has seen ``number``."""
    with stop.heeding():
        if number is not None:
            os.kill(os.getpid(), number)
            deadline = time.monotonic() + 60
            while stop._first is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        return stop.vote(world)


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_asks_for_the_end_and_handlers_are_as_before(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop = Stop(heeds=True)
    assert voted(stop) == 0 and voted(stop, number) == 1
    assert stop.reason == number.name
    assert signal.getsignal(number) is before and signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(("number", "vote"), [(signal.SIGTERM, 5), (signal.SIGINT, 1), (signal.SIGUSR1, 1)])
def test_sigterm_leaves_no_time_for_a_save_that_takes_longer_than_the_grace(number: signal.Signals, vote: int) -> None:
    stop = Stop(heeds=True, grace_s=30)
    stop.save_s = 31
    assert voted(stop, number) == vote
    stop.save_s = 20
    assert stop.vote(4) == 1


def test_the_ranks_do_what_one_of_them_was_asked() -> None:
    for votes, verdict in ((0, ""), (1, "save"), (4, "save"), (5, "leave"), (8, "leave"), (20, "leave")):
        stop = Stop()
        stop.settle(votes, world_size=4)
        assert stop.verdict == verdict


def test_max_hours_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_STARTED", time.monotonic() - 3600)
    assert Stop(heeds=True, max_hours=1.1).vote(2) == 0
    assert Stop(heeds=True, max_hours=0.9).vote(2) == 1
    assert Stop(heeds=True, max_hours=0.9).reason == "max_hours: 0.9"
    assert Stop(heeds=False, max_hours=0.9).vote(2) == 0, "a loop of the user's own is never ended"


def test_a_forked_helper_dies_of_its_signals_and_tells_nobody() -> None:
    stop = Stop(heeds=True)
    with stop.heeding():
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.1)
        assert stop.vote(1) == 0


def test_what_launchers_pass_on_at_once_is_one_signal() -> None:
    code, text = waiting((0.1, signal.SIGINT), (0.0, signal.SIGTERM), (0.1, signal.SIGTERM))
    assert (code, text.splitlines()[-1]) == (0, "went on 1")
    assert text.count("the run ends after this step or shard (a second signal ends it at once)") == 1


def test_a_second_signal_ends_at_once_also_in_native_code() -> None:
    start = time.monotonic()
    code, text = waiting((0.1, signal.SIGUSR1), (0.6, signal.SIGTERM))
    assert code == 128 + signal.SIGTERM and time.monotonic() - start < 6
    assert text.splitlines()[-1] == "a second signal (SIGTERM): ended at once"


def test_sigterm_ends_at_once_when_its_grace_is_over() -> None:
    code, text = waiting((0.1, signal.SIGTERM), grace_s=1)
    assert code == 75
    assert "neither step nor shard ended within stop_grace_seconds (1), so nothing was saved; the same" in text
