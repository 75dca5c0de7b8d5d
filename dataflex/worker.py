"""A run's worker process as its launcher sees it: marks, bad input said once, an end with its parent."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dataflex.utils.errors import UserError

LAUNCH_DIR = "DATAFLEX_LAUNCH_DIR"
WORK_DIR = "DATAFLEX_WORK_DIR"
DEVICES = "DATAFLEX_DEVICES"
USER_ERROR = 2
_PR_SET_PDEATHSIG = 1


def print_error(text: str) -> None:
    """Print each line of a user error on stderr."""
    for line in text.splitlines():
        print(f"dataflex: error: {line}", file=sys.stderr, flush=True)


def run_worker(body: Callable[[], int]) -> int:
    """Run ``body`` in a worker: it ends with its launcher, reports bad input once and marks its completion.

    Where our launcher did not start the worker (``deepspeed --module dataflex.cli``), rank 0 prints the
    error; another rank waits for a moment first, since the launcher ends it if rank 0 has failed as well.
    """
    end_with_parent()
    _settle()
    folder, rank = os.environ.get(LAUNCH_DIR), os.environ.get("RANK", "0")
    try:
        code = body()
    except UserError as e:
        if folder is not None and Path(folder).is_dir():
            _write(Path(folder) / f"error.{rank}", str(e))
        else:
            time.sleep(0 if rank == "0" else 3)
            print_error(str(e))
        return USER_ERROR
    if code == 0 and folder is not None and Path(folder).is_dir():
        _write(Path(folder) / f"done.{rank}", os.environ.get("LOCAL_SIZE", "1"))
    return code


def _settle() -> None:
    """Go to the user's folder, whose modules come after every library's, and see the GPUs that the user named."""
    folder, devices = os.environ.pop(WORK_DIR, None), os.environ.pop(DEVICES, None)
    if folder is not None:
        os.chdir(folder)
        sys.path.append(folder)
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices


def leave(code: int) -> NoReturn:
    """End this worker without Python's finalization: its exit handlers run, its output is flushed.

    While Python finalizes, a thread of the communication backend that asks for the interpreter is ended in the
    middle of C++ code, which aborts the process ("terminate called without an active exception") after all its
    work was done well.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent dies (Linux; elsewhere nothing is done)."""
    parent = os.getppid()
    if prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def prctl(option: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    return bool(ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"partial.{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
