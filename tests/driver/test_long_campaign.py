"""A hundred random kills and signals over every kind of run, elastic restarts too: nothing is lost."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dataflex.report.trainer_log import read_log
from tests.driver.campaign import COMMON, KINDS, SIGNALS
from tests.driver.forked_runs import ForkedRun
from tests.driver.run_files import contents
from tests.driver.workspace import write_yaml
from tests.processes import PATIENCE_S

STRIKES = int(os.environ.get("DATAFLEX_STRIKES", "14"))  # of each kind
A_RUN = 7  # strikes at most, before it may end
FULL = {"finetuning_type": "full", "lora_dropout": None}
ELASTIC = {"per_device_train_batch_size": 2, "lora_dropout": None}  # dropout is drawn by each rank
FORKED: dict[str, dict[str, Any]] = {
    **KINDS,
    "save": KINDS["mix"] | FULL | {"save_steps": 1, "save_total_limit": 3, "deepspeed": "ds_zero3.json"},
    "score": KINDS["select"] | {"keep_features": True},
    "elastic": KINDS["select"] | ELASTIC,
    "elastic full": KINDS["mix"] | FULL | ELASTIC,
}
EXTRA = re.compile(r"checkpoint-\d+/|damaged-checkpoint-\d+/|\w+\.\d+(\.jsonl|/)")
OF_ELASTIC = {1: 4, 2: 2, 4: 1}  # samples of each rank that keep the global batch


@dataclass
class Struck:
    """One run of ``kind`` in ``folder``/``name``. ended: [(strike, exit code)] so far."""

    folder: Path
    kind: str
    name: str
    ended: list[tuple[str, int | None]] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.folder / self.name / "run"

    def start(self, ranks: int) -> ForkedRun:
        changes: dict[str, Any] = {"output_dir": str(self.out)}
        command, more = "train", ["resume_from_checkpoint=auto"]
        if self.kind == "score":
            command, more = "score", [f"resume_from_checkpoint={self.folder}/trained/run/checkpoint-14"]
        if self.kind.startswith("elastic"):
            changes["per_device_train_batch_size"] = OF_ELASTIC[ranks]
        config = write_yaml(self.folder, f"{self.name}.yaml", **(COMMON | FORKED[self.kind] | changes))
        return ForkedRun([command, str(config), *more], ranks)

    def step(self) -> int:
        """The last step in the log; of scoring, the number of shards' files."""
        if self.kind == "score":
            return len(list(self.out.rglob("[!.]*-*.npy")))
        log = self.out / "trainer_log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return max([0, *(json.loads(line).get("current_steps", 0) for line in lines if line.endswith("}"))])

    def strike(self, number: signal.Signals, who: str, step: int, wait_s: float, ranks: int) -> None:
        """Start, signal ``who`` some time after ``step``, and see every rank end."""
        run = self.start(ranks)
        deadline = time.monotonic() + PATIENCE_S
        while self.step() < step and run.poll() is None:
            assert time.monotonic() < deadline, f"{self.name}: step {step} was not reached\n{run.output()}"
            time.sleep(0.005)
        time.sleep(wait_s)
        run.signal(who, number)
        text = run.end(PATIENCE_S)
        self.ended.append((f"{number.name} to {who} of {ranks} after {step}", run.returncode))
        allowed = (0, 75, -number, 128 + number)
        assert run.returncode in allowed, f"{self.kind}: {self.ended}\n{text}"

    def finish(self, ranks: int) -> None:
        run = self.start(ranks)
        text = run.end(PATIENCE_S)
        assert run.returncode == 0, f"{self.kind}: {self.ended}\n{text}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORKED)
def test_random_kills_and_signals_of_ranks(workspace: Path, tmp_path: Path, kind: str) -> None:
    for name in ("data", "model"):
        shutil.copytree(workspace / name, tmp_path / name)
    if kind == "score":
        Struck(tmp_path, "select", "trained").finish(2)
    whole = Struck(tmp_path, kind, "whole")
    whole.finish(2)
    last = whole.step()
    draw = random.Random(f"forked campaign {kind}")
    left, rounds = STRIKES, 0
    while left:
        rounds += 1
        run = Struck(tmp_path, kind, f"struck{rounds}")
        for _ in range(min(left, A_RUN)):
            ranks = draw.choice((1, 2, 4)) if kind.startswith("elastic") else 2
            number = draw.choice((*SIGNALS, *[signal.SIGKILL] * 3))
            who = draw.choice(("all", "rank0", f"rank{ranks - 1}"))
            step = draw.choice((0, max(0, min(last - 1, run.step() + draw.randrange(1, 5)))))
            wait_s = draw.uniform(0.5, 4) if step == 0 else draw.uniform(0, 0.3)  # no rank is one before 0.5 s
            run.strike(number, who, step, wait_s, ranks)
            left -= 1
        run.finish(2)
        if kind.startswith("elastic"):
            near(run, whole)
        else:
            equal(run, whole)


def equal(run: Struck, whole: Struck) -> None:
    """Every file, bit for bit; beside these, only checkpoints of the stops and the logs of starts before them."""
    mine, its = contents(run.out), contents(whole.out)
    more = {name for name in mine.keys() - its.keys() if not EXTRA.match(name)}
    assert not more and not its.keys() - mine.keys(), f"{run.kind}: {run.ended}"
    unlike = [name for name in its if mine[name] != its[name]]
    assert not unlike, f"{run.kind}: {run.ended}"


def near(run: Struck, whole: Struck) -> None:
    """The same steps, learning rates and choices; losses within the noise of sums."""
    mine, its = read_log(run.out), read_log(whole.out)
    assert [e["current_steps"] for e in mine] == [e["current_steps"] for e in its], run.ended
    assert [e.get("lr") for e in mine] == [e.get("lr") for e in its], run.ended
    losses = [[e["loss"] for e in log if "loss" in e] for log in (mine, its)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), run.ended
    for path in whole.out.glob("decisions/*.json"):
        again = run.out / "decisions" / path.name
        assert picks(again) == picks(path), run.ended


def picks(path: Path) -> list[int] | None:
    """The samples that a selector chose; a mixer's record has none."""
    chosen: list[int] | None = json.loads(path.read_text()).get("indices")
    return chosen
