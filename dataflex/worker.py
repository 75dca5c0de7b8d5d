"""A run's worker process as its launcher sees it: marks, bad input said once, an end with its parents."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from dataflex.utils import stopping
from dataflex.utils.errors import UserError
from dataflex.utils.launch_folder import end_with_launcher, launch_folder, mark

WORK_DIR = "DATAFLEX_WORK_DIR"
DEVICES = "DATAFLEX_DEVICES"
USER_ERROR = 2
_PR_SET_PDEATHSIG = 1


def print_error(text: str) -> None:
    """Print each line of a user error on stderr."""
    for line in text.splitlines():
        print(f"dataflex: error: {line}", file=sys.stderr, flush=True)


def run_worker(body: Callable[[], int]) -> int:
    """Run ``body`` in a worker: it ends with its launcher, reports bad input once and marks its end.

    Where our launcher did not start the worker (``deepspeed --module dataflex.cli``), rank 0 prints the
    error; another rank waits for a moment first, since the launcher ends it if rank 0 has failed as well.
    """
    _end_by_signals()
    end_with_parent()
    end_with_launcher()
    mark("pid", f"{os.getpid()} {os.environ.get('LOCAL_SIZE', '1')}")
    _settle()
    try:
        code = body()
    except UserError as e:
        if launch_folder() is not None:
            mark("error", str(e))
        else:
            time.sleep(0 if os.environ.get("RANK", "0") == "0" else 3)
            print_error(str(e))
        return USER_ERROR
    if code == 0:
        mark("done", os.environ.get("LOCAL_SIZE", "1"))
    elif code == stopping.EXIT_CODE:
        mark("stopped", "")
    return code


def _settle() -> None:
    """Go to the user's folder, whose modules come after every library's, and see the GPUs that the user named.

    Where a rank is gone, torch would print its stack on every other one.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
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


def leave_with(body: Callable[[], int]) -> None:
    """`leave` with the exit code of ``body``; where it raises an error, with 1 once that is printed."""
    code = 1
    try:
        code = body()
    finally:
        kind, error, traceback = sys.exc_info()
        if kind is not None and error is not None and not isinstance(error, SystemExit):
            sys.excepthook(kind, error, traceback)
        if not isinstance(error, SystemExit):
            leave(code)


def _end_by_signals() -> None:
    """Ctrl-C ends a worker without a traceback, and also while native code runs."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (Linux; elsewhere nothing is done)."""
    parent = os.getppid()
    if prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def prctl(option: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    return bool(ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0)
