"""Strikes against a launched run: signals and kills at a step, then the same command again, to the same end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataflex.report.trainer_log import read_log
from tests.distributed import ROOT
from tests.driver.forked_runs import ForkedRun
from tests.driver.workspace import write_yaml
from tests.processes import PATIENCE_S, all_end, descendants

COMMON: dict[str, Any] = {"max_steps": None, "save_steps": 7, "lora_dropout": 0.1, "deepspeed": "ds_zero2.json"}
KINDS: dict[str, dict[str, Any]] = {
    "select": {
        "train_type": "dynamic_select",
        "component_name": "less",
        "eval_dataset": ["target"],
        "warmup_step": 6,
        "update_step": 6,
        "update_times": 3,
        "score_shard_samples": 8,
        "scoring_batch_tokens": 96,
        "deepspeed": "ds_zero3.json",
    },
    "mix": {"train_type": "dynamic_mix", "component_name": "odm", "update_step": 5, "max_steps": 30},
    "weight": {"train_type": "dynamic_weight", "component_name": "loss", "max_steps": 30},
    "stream": {"streaming": True, "buffer_size": 8, "max_steps": 30, "init_mixture_proportions": [3, 1]},
}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
WHO = ("command", "runner", "launch", "rank0", "rank1")


@dataclass
class Campaign:
    """One run of ``kind`` in ``folder``/``name``, on two ranks. ended: [(strike, exit code)] so far."""

    folder: Path
    kind: str
    name: str
    overrides: tuple[str, ...] = ("resume_from_checkpoint=auto",)
    ended: list[tuple[str, int]] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.folder / self.name

    def command(self) -> list[str]:
        """The words of the command after ``dataflex-cli``, but for the number of ranks: always the same."""
        keys = COMMON | KINDS[self.kind] | {"output_dir": str(self.out)}
        return ["train", str(write_yaml(self.folder, f"{self.name}.yaml", **keys)), *self.overrides]

    def start(self) -> subprocess.Popen[str]:
        """Give the command, under the launcher."""
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "PYTHONWARNINGS")}
        env = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
        words = [sys.executable, "-m", "dataflex.cli", *self.command(), "--num_processes=2"]
        heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - a shell's job may ignore it
        out: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(words, env=env, cwd=self.folder, preexec_fn=heed, **out)

    def step(self) -> int:
        """The last step that is in the log."""
        log = self.out / "trainer_log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return max([0, *(json.loads(line).get("current_steps", 0) for line in lines if line.endswith("}"))])

    def reach(self, process: subprocess.Popen[str], step: int) -> bool:
        """Wait until the run has logged ``step``; False where it ended before."""
        deadline = time.monotonic() + PATIENCE_S
        while self.step() < step:
            if process.poll() is not None:
                return False
            assert time.monotonic() < deadline, f"{self.name}: step {step} was not reached"
            time.sleep(0.01)
        return True

    def strike(self, step: int, number: signal.Signals, who: str = "command", wait_s: float = 0.0) -> tuple[int, str]:
        """Start, signal ``who`` some time after ``step``, and see every process of the run end; code and output."""
        process = self.start()
        try:
            self.reach(process, step)
            time.sleep(wait_s)
            everyone = descendants(process.pid)
            places = dict(zip(WHO, everyone, strict=False))
            if who in places:
                os.kill(places[who], number)
            text = process.communicate(timeout=PATIENCE_S)[0]
            assert all_end(everyone, 60), f"{self.name}: {number.name} to {who} left processes behind\n{text}"
        finally:
            process.kill()
        self.ended.append((f"{number.name} to {who} after step {step}", process.returncode))
        return process.returncode, text

    def finish(self) -> str:
        """Give the command, without the launcher and its imports, until the run is complete; what it printed."""
        code, text = self.forked()
        assert code == 0, f"{self.name}: {self.ended}\n{text}"
        return text

    def forked(self) -> tuple[int | None, str]:
        """Give the command without the launcher and its imports; the exit code, and what it printed."""
        run = ForkedRun(self.command(), 2)
        text = run.end(PATIENCE_S)
        return run.returncode, text

    def result(self) -> dict[str, Any]:
        """What the run has made, without times."""
        keys = ("current_steps", "loss", "lr", "grad_norm", "epoch")
        return {
            "log": [{key: e.get(key) for key in keys} for e in read_log(self.out)],
            "weights": (self.out / "adapter_model.safetensors").read_bytes(),
            "decisions": {p.name: p.read_text() for p in self.out.glob("decisions/*.json")},
            "mixture": {p.name: p.read_text() for p in self.out.glob("*_weights.jsonl")},
        }
