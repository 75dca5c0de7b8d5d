"""Ending a run on request: what the signals and max_hours ask for, and what the ranks then agree on.

A signal may reach one rank or all, and several senders may pass the same one on within milliseconds. A thread reads
the signals as they arrive, also while the main thread waits in native code; the loop asks at every step boundary.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from dataflex.utils import launch_folder
from dataflex.utils.logging import logger

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: give the same command again
HUNG = 69  # EX_UNAVAILABLE of sysexits.h: a rank was no longer there for the others
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_SIGNAL_S = 2.0  # what follows within this time is the first signal, passed on by launchers
_STARTED = time.monotonic()


class Stopped(Exception):  # noqa: N818 - not an error
    """The run has ended on request; the text is the last line on the screen."""


class Stop:
    """When one run is to end. Without ``heeds`` (a loop of the user's own) it never is.

    grace_s: seconds between a SIGTERM and the SIGKILL that its sender has in mind. max_hours: of this process.
    save_s: how long the last save took. last: the checkpoint that a resume would take. verdict: what the ranks agreed
    on, "" while the run goes on.
    """

    def __init__(self, heeds: bool = False, grace_s: float = 30.0, max_hours: float | None = None) -> None:
        self.heeds, self.grace_s, self.max_hours = heeds, grace_s, max_hours
        self.save_s = 0.0
        self.last: Path | None = None
        self.verdict: Literal["", "save", "leave"] = ""
        self._first: tuple[signal.Signals, float] | None = None
        self._listener: _Listener | None = None

    @property
    def asked(self) -> bool:
        """Whether this process was asked for an end, by a signal or by its time."""
        return self._first is not None or self._out_of_time()

    @property
    def reason(self) -> str:
        """Who asked for the end, for the screen."""
        if self._first is not None:
            return self._first[0].name
        return f"max_hours: {self.max_hours:g}" if self._out_of_time() else "asked of another process"

    def vote(self, world_size: int) -> int:
        """This rank's wish, for a sum over ranks: 0, 1 (end here) or more than all ones (end without a save)."""
        if self._first is None:
            return int(self._out_of_time())
        number, since = self._first
        late = number == signal.SIGTERM and time.monotonic() - since + self.save_s > self.grace_s
        return world_size + 1 if late else 1

    def settle(self, votes: int, world_size: int) -> None:
        """Take note of the sum of all ranks' votes."""
        if votes:
            self.verdict = "leave" if votes > world_size else "save"

    def heed(self) -> None:
        """From now on signals ask for an end instead of ending the process; again is the same as once."""
        if self.heeds and self._listener is None:
            self._listener = _Listener(self)

    @contextlib.contextmanager
    def heeding(self) -> Iterator[None]:
        """`heed` inside, and as before outside."""
        before = self._listener
        self.heed()
        try:
            yield
        finally:
            if before is None:
                self.unheed()

    def unheed(self) -> None:
        """Let signals end the process again."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _out_of_time(self) -> bool:
        return self.heeds and self.max_hours is not None and time.monotonic() - _STARTED >= self.max_hours * 3600

    def _note(self, number: signal.Signals) -> None:
        """Called in the listener's thread."""
        now = time.monotonic()
        if self._first is None:
            self._first = number, now
            logger.info(f"{number.name}: the run ends after this step or shard (a second signal ends it at once)")
        elif now - self._first[1] >= SAME_SIGNAL_S:
            logger.warning(f"a second signal ({number.name}): ended at once")
            os._exit(128 + number)

    def _check_grace(self) -> None:
        """End the process where SIGTERM's grace is over before the step is: its sender would kill it anyway."""
        if self._first is None or self._first[0] != signal.SIGTERM or self.verdict:
            return
        if time.monotonic() - self._first[1] >= self.grace_s:
            logger.warning(
                f"stopped (SIGTERM): neither step nor shard ended within stop_grace_seconds ({self.grace_s:g}), so "
                "nothing was saved; the same command goes on from the last whole checkpoint"
            )
            launch_folder.mark("stopped", "")
            os._exit(EXIT_CODE)


class _Listener(threading.Thread):
    """Tells ``stop`` of each signal at once. Made and closed in the main thread, as Python asks for."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(name="signals", daemon=True)
        self.stop = stop
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.fd_before = signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        self.before = {number: signal.signal(number, _nothing) for number in _heeded()}
        for number in self.before:
            signal.siginterrupt(number, False)  # system calls of native libraries go on
        _LISTENING[:] = [self]
        self.start()

    def run(self) -> None:
        while True:
            ready, _, _ = select.select([self.read_end], [], [], 0.5)
            numbers = os.read(self.read_end, 64) if ready else b""
            if 0 in numbers:
                return
            for number in numbers:
                if number in self.before:
                    self.stop._note(signal.Signals(number))
            self.stop._check_grace()

    def close(self) -> None:
        self.restore()
        os.write(self.write_end, b"\0")
        self.join()
        os.close(self.read_end)
        os.close(self.write_end)

    def restore(self) -> None:
        _LISTENING.clear()
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.fd_before)


_LISTENING: list[_Listener] = []


def _heeded() -> list[signal.Signals]:
    """All but those that whoever started us has told us to ignore, as nohup does."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def leave_signals_to_parent(_worker: int) -> None:
    """In a helper that ends with its parent: a signal to all processes of a job must not end it before that."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _nothing(number: int, frame: object) -> None:
    """A handler must be there for the number to be written to the listener's pipe."""


def _default_in_child() -> None:
    """A forked helper dies of its signals, and does not tell its parent of them."""
    for listener in list(_LISTENING):
        listener.restore()


os.register_at_fork(after_in_child=_default_in_child)
