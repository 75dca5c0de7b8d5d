"""From the runner's end and the marks of the workers to the run's exit code, with one clear line."""

from __future__ import annotations

import signal
from pathlib import Path

from dataflex.launcher.processes import Ended
from dataflex.utils.stopping import EXIT_CODE, HUNG
from dataflex.worker import USER_ERROR, print_error


def outcome(ended: Ended, folder: Path, ssh: bool) -> int:
    """The run's exit code. folder: the launch folder. ssh: workers on other machines leave no marks in it."""
    code, received = ended.code, ended.received
    for kind, meant in (("error", USER_ERROR), ("hung", HUNG)):
        if text := _first_said(folder, kind):
            print_error(text)
            return meant
    lost = _first_said(folder, "lost")
    done = list(folder.glob("done.*"))
    complete = bool(done) and len(done) == int(done[0].read_text(encoding="utf-8"))
    if code == 0 and (complete or ssh):
        return 0
    stopped = code == EXIT_CODE or any(folder.glob("stopped.*"))
    if len(received) < 2 and stopped and not any(folder.glob("failed.*")):
        return EXIT_CODE  # rank 0 has said so
    if received:
        print_error(f"stopped by {signal.Signals(received[-1]).name}")
        return 128 + received[-1]
    if code < 0:
        print_error(f"the launcher was killed by {signal.Signals(-code).name}")
        return 128 - code
    if code == 0:
        print_error("the launcher ended before the training was complete (was it killed?)")
        return 1
    if code > 192 and code - 256 in {-number for number in signal.Signals}:
        print_error(f"a worker was killed by {signal.Signals(256 - code).name} (out of memory?){lost and ': ' + lost}")
    else:
        print_error(lost or f"a worker, or the launcher, ended with exit code {code}; its messages are above")
    return code


def _first_said(folder: Path, kind: str) -> str:
    """What the lowest rank that left a mark of this kind has to say; "" without one."""
    marks = sorted(folder.glob(f"{kind}.*"), key=lambda path: int(path.suffix[1:]))
    return marks[0].read_text(encoding="utf-8") if marks else ""
