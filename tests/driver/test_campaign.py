"""Kills and signals against launched runs: nothing is lost, no process is left, and the end is bit-identical."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import ROOT
from tests.driver.campaign import KINDS, SIGNALS, WHO, Campaign
from tests.driver.workspace import write_yaml
from tests.processes import PATIENCE_S, all_end, descendants

STRIKES = 5  # of each kind: a start by the launcher takes its time; `test_long_campaign` has more


@pytest.mark.slow
def test_one_command_through_a_second_run_a_signal_and_a_kill(workspace: Path) -> None:
    short = ("max_steps=18",)
    run = Campaign(workspace, "mix", "struck", short)
    first = run.start()
    try:
        assert run.reach(first, 2)
        everyone = descendants(first.pid)
        first.send_signal(signal.SIGSTOP)  # so that it passes no signal on before its workers are suspended too
        for pid in everyone[1:]:
            os.kill(pid, signal.SIGSTOP)
        saved, log = sorted(run.out.glob("checkpoint-*")), (run.out / "trainer_log.jsonl").read_text()
        code, text = run.forked()
        assert code == 2
        line = rf"dataflex: error: output_dir: {run.out} is in use by another run \(process {first.pid} on "
        assert re.search(line + rf"{socket.gethostname()}, started 20[-\d]+ [:\d]+\+\d\d:\d\d\); wait for", text), text
        assert sorted(run.out.glob("checkpoint-*")) == saved and (run.out / "trainer_log.jsonl").read_text() == log
        for pid in (*everyone[1:], first.pid):
            os.kill(pid, signal.SIGCONT)
        first.send_signal(signal.SIGUSR1)
        text = first.communicate(timeout=PATIENCE_S)[0]
        assert first.returncode == 75 and all_end(everyone, 60)
        last = text.splitlines()[-1]
        expected = r"stopped after step \d+ of 18 \(SIGUSR1\): saved .*; the same command goes on from there"
        assert re.fullmatch(expected, last), text
    finally:
        first.kill()
    code, _ = run.strike(run.step() + 2, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert "resumed from" in run.finish()
    whole = Campaign(workspace, "mix", "unstruck", short)
    whole.finish()
    assert run.result() == whole.result()
    assert len(run.result()["log"]) == 18


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_random_kills_and_signals(workspace: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(workspace / "data", tmp_path / "data")
    shutil.copytree(workspace / "model", tmp_path / "model")
    whole = Campaign(tmp_path, kind, "whole")
    whole.finish()
    steps = len(whole.result()["log"])
    draw = random.Random(f"campaign {kind}")
    left, round_number = STRIKES, 0
    while left:
        round_number += 1
        run = Campaign(tmp_path, kind, f"struck{round_number}")
        for _ in range(min(left, 5)):
            number = draw.choice((*SIGNALS, *[signal.SIGKILL] * 3))
            who = draw.choice(WHO) if number == signal.SIGKILL else draw.choice(("command", "rank0", "rank1"))
            step = draw.choice((0, min(steps - 1, run.step() + draw.randrange(1, 6))))
            code, text = run.strike(step, number, who, wait_s=draw.random() * (8 if step == 0 else 0.3))
            assert code != 2, f"{kind}: {run.ended}\n{text}"
            left -= 1
        run.finish()
        assert run.result() == whole.result(), f"{kind}: {run.ended}"


@pytest.mark.slow
def test_started_by_hand_under_deepspeed(workspace: Path) -> None:
    """Ctrl-C goes to all processes, and launch.py adds SIGTERMs of its own, one rank after the other."""
    out = workspace / "by_hand"
    config = write_yaml(workspace, "by_hand.yaml", output_dir=str(out), max_steps=60, deepspeed="ds_zero2.json")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2", "--master_port=29731"]
    words += ["--module", "dataflex.cli", "train", str(config)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(
        words, env=env, cwd=workspace, text=True, start_new_session=True, preexec_fn=heed, **pipes
    )  # type: ignore[call-overload]
    run = Campaign(workspace, "mix", "by_hand", overrides=())
    try:
        assert run.reach(process, 2)
        everyone = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        text = process.communicate(timeout=PATIENCE_S)[0]
        assert all_end(everyone, 40), text
    finally:
        process.kill()
    assert re.search(r"stopped after step \d+ of 60 \(SIGINT\): saved .*checkpoint-\d+; the same command", text), text
