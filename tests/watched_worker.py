"""A worker under the watch for tests/utils/test_watchdog.py: `python -m watched_worker <what rank 1 does>`."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

from dataflex.worker import leave_with, run_worker

TIMEOUT_S, BEAT_S = 3.0, 0.2


def stopped() -> None:
    time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGSTOP)


def hung() -> None:
    time.sleep(60)


def fails() -> None:
    raise KeyError("of rank 1")


def vanishes() -> None:
    os._exit(7)


def ends() -> None:
    time.sleep(1.0)


def body() -> int:
    import torch.distributed

    from dataflex.utils import dist, standing, watchdog

    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=30))

    def work() -> None:
        standing.after_step(7)
        if dist.rank() == 1:
            {"stopped": stopped, "hung": hung, "fails": fails, "vanishes": vanishes, "ends": ends}[sys.argv[1]]()
        dist.barrier()

    return watchdog.watched(work, TIMEOUT_S, BEAT_S)


if __name__ == "__main__":
    leave_with(lambda: run_worker(body))
