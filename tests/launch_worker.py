"""A worker without torch for tests/test_launcher.py: `python -m launch_worker <what> [folder]`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from dataflex.utils.errors import UserError
from dataflex.worker import run_worker


def body() -> int:
    what, rank = sys.argv[1], os.environ["RANK"]
    if len(sys.argv) > 2:
        facts = {k: os.environ.get(k, "") for k in ("WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "DS_ACCELERATOR")}
        target = Path(sys.argv[2]) / f"rank{rank}"
        target.with_suffix(".part").write_text(f"{os.getpid()} {os.getppid()} {facts}", encoding="utf-8")
        target.with_suffix(".part").rename(target)
    if what == "imports":
        Path(sys.argv[2], f"imported{rank}").write_text(imported(), encoding="utf-8")
    if what == "refuse" and rank == "1":
        raise UserError("pool.json:3: instruction is missing\npool.json:9: output is missing")
    if what == "exit3":
        return 3
    if what in ("sleep", "refuse"):
        time.sleep(60)
    return 0


def imported() -> str:
    """Lines: the working folder, what lies in it, and the files of two libraries."""
    import random

    import beside
    import datasets

    return "\n".join([os.getcwd(), beside.HERE, str(random.__file__), str(datasets.__file__)])


if __name__ == "__main__":
    sys.exit(run_worker(body))
