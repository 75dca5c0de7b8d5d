"""Where this process's main thread is at this moment, in words, as another thread sees it."""

from __future__ import annotations

import sys
import sysconfig
import threading
from pathlib import Path
from types import FrameType
from typing import NamedTuple

_PACKAGE = str(Path(__file__).parents[1])
_PATHS = [Path(path) for path in sysconfig.get_paths().values()]
_LIBRARIES = ("<", *map(str, _PATHS), *(str(path.resolve()) for path in _PATHS))
_WAITING = ("/torch/distributed/", "/deepspeed/comm/", f"{_PACKAGE}/utils/dist.py", f"{_PACKAGE}/scoring/gather.py")
_steps_done = 0


class Standing(NamedTuple):
    """place: the innermost line of the package or of the user's own code. waits: the call there that waits for other
    ranks, or "". steps: optimizer steps that are done. stack: a digest of the whole stack, which stays the same while
    nothing moves.
    """

    place: str
    waits: str
    steps: int
    stack: int


def after_step(done: int) -> None:
    """Note how many optimizer steps are done."""
    global _steps_done
    _steps_done = done


def main_thread() -> Standing:
    """Where the main thread is; in a collective it is the line that called for it."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    place, waits = None, ""
    trace: list[tuple[str, int]] = []
    while frame is not None:
        if place is None:
            path = frame.f_code.co_filename
            if any(part in path for part in _WAITING):
                waits = frame.f_code.co_name
            elif _own(path):
                place = _said(frame)
        trace.append((frame.f_code.co_filename, frame.f_lasti))
        frame = frame.f_back
    return Standing(place or "no line of a run", waits, _steps_done, hash(tuple(trace)))


def _own(path: str) -> bool:
    return path.startswith(_PACKAGE) or not path.startswith(_LIBRARIES)


def _said(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    inside = path.is_relative_to(_PACKAGE)
    return f"{frame.f_code.co_name} ({path.relative_to(Path(_PACKAGE).parent) if inside else path}:{frame.f_lineno})"
