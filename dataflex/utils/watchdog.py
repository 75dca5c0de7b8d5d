"""A watch over the ranks of a run: who stands still, or has failed, is named, and nobody waits for them.

A thread of every rank tells the others each few seconds where its main thread is. Rank 0 looks at all of them, and all
look at rank 0. A rank of which nothing more is heard ends the run after `SILENT_S`; so does, after ``ddp_timeout``, a
run in which no step ends while a rank stands still at another place than the others. A thread beats whatever the
main thread does (long tokenization, a wait, a scoring pass), unless that holds the interpreter's lock: a process on
the same machine that uses its processor is therefore never taken for a silent one. Silence is counted in beats of one's
own, so that a machine that was suspended as a whole does not count as silent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

from dataflex.utils import dist, launch_folder
from dataflex.utils.beats import BEAT_S, Beat, Watch, has_ended
from dataflex.utils.errors import UserError, cut
from dataflex.utils.logging import logger
from dataflex.utils.stopping import EXIT_CODE, HUNG, Stopped

GRACE_S = 3.0  # in which a rank that fails says so
ENDS_WITHIN_S = 60.0  # in which also a busy machine's launcher ends what is left of a run that has failed
RANK_0_S = 1.0  # by which the others let rank 0 speak first, where it fails as they do
FAILED_S = 20.0  # after which a rank that another machine's launcher does not end follows one that has failed


def patience(timeout_s: float) -> float:
    """How long collectives wait for ranks that do not come: long enough that the watch has spoken before."""
    return timeout_s + 4 * min(BEAT_S, timeout_s / 10)


def watched(body: Callable[[], object], timeout_s: float, beat_s: float = BEAT_S) -> int:
    """Run ``body`` under a watch where there are several ranks; its exit code. A collective.

    The process group ends with it where it went well. An error is raised on the rank that had it, and only there:
    ranks that merely lost another, or waited for it in vain, end with a code, after one line if nobody else said why.
    """
    guard = _Guard(timeout_s, beat_s) if dist.world_size() > 1 else None
    code = 0
    try:
        body()
    except Stopped as stopped:
        logger.info(str(stopped))
        code = EXIT_CODE
    except BaseException as exc:
        ended = guard.after(exc) if guard is not None else None
        if ended is None:
            raise
        return ended
    if guard is not None:
        guard.end()
    dist.shut_down()
    return code


class _Guard:
    """The threads of a `Watch`, and what they do to this process."""

    def __init__(self, timeout_s: float, beat_s: float) -> None:
        store = dist.connection_to_store(timeout_s)
        self.watch = Watch(store, dist.rank(), dist.world_size(), timeout_s, min(beat_s, timeout_s / 10))
        self.ended = threading.Event()
        dist.barrier()  # every rank's first beat is there
        self.watch.round()
        self.beating = threading.Thread(target=self._beat, name="watch", daemon=True)
        self.beating.start()
        if dist.rank() > 0:
            threading.Thread(target=self._see_rank_0, name="watch of rank 0", daemon=True).start()

    def end(self) -> None:
        """End the watch before rank 0, which has the store, ends; a collective."""
        self.ended.set()
        self.beating.join()
        self.watch.end()
        dist.barrier()

    def after(self, exc: BaseException) -> int | None:
        """The exit code of a rank in which ``exc`` came up; None where it is an error of its own, to be raised."""
        self.ended.set()
        if not dist.is_failure_of_others(exc):
            return self._own_error(exc)
        time.sleep(GRACE_S)
        watch = self.watch
        try:
            if watch.others_failed():
                return _quiet_end()
            text, late = self._said(exc), dist.is_timeout(exc)
            if watch.settle(text):
                _say("hung" if late else "lost", text)
        except RuntimeError:  # the store is gone with rank 0
            _say("lost", f"{watch.own.name}, {watch.own.doing}: lost rank 0 ({_first_words(exc)})")
        return HUNG

    def _own_error(self, exc: BaseException) -> int | None:
        """None on the rank whose error is the first, and for bad input, which the launcher says once."""
        launch_folder.mark("failed", "")
        time.sleep(RANK_0_S if self.watch.own.rank and not isinstance(exc, UserError) else 0)
        first = True
        with contextlib.suppress(RuntimeError):  # where the store is gone with rank 0
            first = self.watch.first_failed() == self.watch.own.rank
        if first or isinstance(exc, UserError):
            return None
        return _quiet_end()

    def _said(self, exc: BaseException) -> str:
        watch = self.watch
        if dist.is_timeout(exc):
            return f"waited in vain for {watch.timeout_s:.0f} s (ddp_timeout): {watch.compared()}"
        gone = [beat for beat in watch.everyone() if not beat.ended and has_ended(beat)]
        if gone:
            return f"{gone[0].name} has ended without a word: it was last {gone[0].doing}"
        return f"{watch.own.name}, {watch.own.doing}: lost another rank ({_first_words(exc)})"

    def _beat(self) -> None:
        watch = self.watch
        while not self.ended.wait(watch.beat_s):
            try:
                text = watch.round()
                if text and not watch.settle(text):
                    text = ""
            except RuntimeError:  # the store does not answer; see `_see_rank_0`
                continue
            if text is not None:
                self._leave(text, watch.silent())
            if watch.failed_s >= FAILED_S and not self.ended.is_set():
                os._exit(1)

    def _see_rank_0(self) -> None:
        """The store is rank 0's: where rank 0 is stopped, asking it does not return."""
        watch, seen, missed_s = self.watch, -1, 0.0
        limit_s = watch.silent_s + (2 * watch.beat_s if watch.own.rank > 1 else 0)
        while not self.ended.wait(watch.beat_s):
            missed_s, seen = 0.0 if watch.rounds != seen else missed_s + watch.beat_s, watch.rounds
            if missed_s >= limit_s and 0 in watch.known and not watch.works(watch.known[0]):
                self._leave(watch.said_silent([watch.known[0]]), [watch.known[0]])

    def _leave(self, text: str, silent: list[Beat]) -> None:
        """End this process, and those of our launch that are stopped: they do not heed their launcher's SIGTERM."""
        if self.ended.is_set():
            return
        if text:
            _say("hung", text)
        time.sleep(2 * self.watch.beat_s)  # for the others to read that it is said
        for beat in silent:
            with contextlib.suppress(OSError):
                if beat.host == self.watch.own.host and os.getpgid(beat.pid) == os.getpgrp():
                    os.kill(beat.pid, signal.SIGKILL)
        os._exit(HUNG)


def _quiet_end() -> int:
    """The exit code where another rank has said why, and whose end the launcher is to see first."""
    time.sleep(ENDS_WITHIN_S)
    return 1


def _say(kind: str, text: str) -> None:
    """One line on the screen: by the launcher, where it is ours, once and with what it knows."""
    if launch_folder.launch_folder() is not None:
        launch_folder.mark(kind, text)
    else:
        logger.error(text)


def _first_words(exc: BaseException) -> str:
    """The message of a communication library without its source line and its advice."""
    return cut(str(exc).rpartition("cc:")[2].partition("] ")[2].split(". ")[0] or str(exc), 100)
