"""Runs pytest again and again in forks of one process that has imported the large libraries, which take seconds.

``python -m tests.mutants.warm`` reads a line of JSON, ``{"args": [...], "said": file, "limit_s": seconds}``, from
standard input, and answers with a line: pytest's exit code, or null where the time was over. Each fork imports the
package and the tests from the working folder as they are now.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from typing import Any

# Not what pytest has plugins of, which it wants to import itself.
LIBRARIES = (
    "torch",
    "deepspeed.ops",
    "transformers",
    "datasets",
    "peft",
    "pandas",
    "pyarrow.parquet",
    "pydantic",
    "yaml",
)

NO_PYTEST = 3  # as pytest calls an error of its own


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in LIBRARIES:
            importlib.import_module(name)
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401
    assert not [name for name in sys.modules if name.startswith("dataflex")], "they are to be imported by each fork"
    for line in sys.stdin:
        print(json.dumps(in_a_fork(**json.loads(line))), file=answers, flush=True)


def in_a_fork(args: list[str], said: str, limit_s: float) -> int | None:
    """The exit code of pytest with ``args``, in a process group that is killed when the time is over."""
    pid = os.fork()
    if pid == 0:
        code = NO_PYTEST
        try:
            code = pytest_in_this_process(args, said)
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)
    deadline = time.monotonic() + limit_s
    status = None
    while status is None and time.monotonic() < deadline:
        found, value = os.waitpid(pid, os.WNOHANG)
        status = value if found else None
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if status is None:
        os.waitpid(pid, 0)
        return None
    return abs(os.waitstatus_to_exitcode(status))


def pytest_in_this_process(args: list[str], said: str) -> int:
    os.setsid()
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null: Any = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdin, sys.stdout = open(0), open(1, "w", buffering=1)  # noqa: SIM115
    import pytest

    return int(pytest.main(args))


if __name__ == "__main__":
    main()
