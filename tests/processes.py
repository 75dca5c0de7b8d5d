"""Looking at processes from outside: whether they run, and what they have started."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

# What hangs for ever is found then; what is slow beside other work is not taken for that.
PATIENCE_S = 900


def runs(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def descendants(pid: int) -> list[int]:
    """The process and all that it started, itself first."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(d for child in children for d in descendants(int(child)))]


def all_end(pids: Iterable[int], within_s: float) -> bool:
    """Whether all of them have ended after at most so long."""
    deadline = time.monotonic() + within_s
    while any(runs(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
