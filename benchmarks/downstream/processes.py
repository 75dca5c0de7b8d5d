"""The processes of the comparison: a selection, or a training by dataflex's command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from downstream.suites import ROOT


def select(job: Path, threads: int) -> None:
    """Run `one_selection` on the job file."""
    _run([str(Path(__file__).with_name("one_selection.py")), str(job)], threads)


def train(config: Path, threads: int) -> None:
    """Run ``dataflex-cli train`` on one process."""
    _run(["-m", "dataflex.cli", "train", str(config), "--num_processes", "1"], threads)


def _run(words: list[str], threads: int) -> None:
    fixed = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *words], env={**os.environ, **fixed}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
