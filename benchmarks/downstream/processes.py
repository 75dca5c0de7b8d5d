"""The processes of the comparison: a selection, or a training by dataflex's command line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from downstream.suites import ROOT


def select(job: Path, threads: int) -> None:
    """Run `one_selection` on the job file."""
    _run([str(Path(__file__).with_name("one_selection.py")), str(job)], threads, {})


def train(config: Path, threads: int, is_over: Callable[[], bool]) -> None:
    """Run ``dataflex-cli train`` on one process until ``is_over``.

    It is started as a launcher starts it: three processes fewer that load PyTorch.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _run(["-m", "dataflex.cli", "train", str(config)], threads, launched, is_over)


def _run(words: list[str], threads: int, more: dict[str, str], is_over: Callable[[], bool] = lambda: False) -> None:
    fixed = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **more}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen([sys.executable, *words], env={**os.environ, **fixed}, stdout=said, stderr=said)
        try:
            while process.poll() is None:
                if is_over():
                    return
                time.sleep(0.5)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(words)} failed:\n{said.read()[-3000:]}")
