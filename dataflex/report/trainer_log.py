"""What a run says while it trains: trainer_log.jsonl, trainer_state.json, the progress bar, monitors."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, with_config
from tqdm import tqdm
from typing_extensions import NotRequired, TypedDict

from dataflex.core.clock import DECIDE, EVALUATE, SAVE, SCORE, TRAIN, Clock
from dataflex.core.context import Run
from dataflex.core.hook import Hook
from dataflex.report.trackers import Tracker
from dataflex.utils.errors import UserError
from dataflex.utils.files import write_atomically
from dataflex.utils.logging import logger
from dataflex.utils.records import DamagedError, read_lines


class LogHook(Hook):
    """Writes one line per ``logging_steps`` steps; ``history`` holds them all and survives a resume.

    It starts the run's clock, which goes on where the checkpoint's stood.
    """

    def __init__(self, logging_steps: int, trackers: Callable[[], list[Tracker]] = list) -> None:
        """trackers: opens those that the figures go to as well, on rank 0 when training starts."""
        self.logging_steps = logging_steps
        self._open_trackers = trackers
        self._trackers: list[Tracker] = []
        self.history: list[dict[str, Any]] = []
        self.best: Callable[[], dict[str, Any]] = dict  # what trainer_state.json says of the best checkpoint
        self.clock = Clock()
        self._losses: list[float] = []  # of the steps since the last line
        self._sum, self._steps = 0.0, 0  # of the losses of all steps that had one
        self._samples = 0  # of all steps
        self._rate = 0.0  # that the step under way is made with
        self._bar: tqdm[Any] | None = None

    def on_train_start(self, run: Run) -> None:
        run.clock = self.clock
        self.clock.start()
        if run.is_main:
            self._trackers = self._open_trackers()
        if run.is_main and sys.stderr.isatty():
            self._bar = tqdm(total=run.total_steps, initial=run.step, unit="step", dynamic_ncols=True)
        self._write(run)

    def on_step_start(self, run: Run, batch: Any) -> None:
        self._rate = float(run.engine.get_lr()[0])

    def on_step_end(self, run: Run, batch: Any) -> None:
        self._samples += len(batch.sample_ids)
        if math.isfinite(run.loss):
            self._losses.append(run.loss)
            self._sum, self._steps = self._sum + run.loss, self._steps + 1
        if self._bar is not None:
            self._bar.update(1)
        if run.step % self.logging_steps and run.step != run.total_steps:
            return
        entry = self._entry(run)
        self._losses = []
        self.add(run, entry)
        shown = {key: f"{entry[key]:.4g}" for key in ("loss", "grad_norm", "lr", "epoch", *run.figures) if key in entry}
        if self._bar is not None:
            self._bar.set_postfix(shown)
        else:
            words = " ".join(f"{key} {value}" for key, value in shown.items())
            logger.info(f"step {run.step}/{run.total_steps} {words} remaining {entry['remaining_time']}")

    def add(self, run: Run, entry: dict[str, Any]) -> None:
        """Append a line, for instance an evaluation's, to the log and the monitors."""
        self.history.append(entry)
        if run.is_main and run.output_dir is not None:
            with (run.output_dir / "trainer_log.jsonl").open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(entry) + "\n")
        values = {k: v for k, v in entry.items() if isinstance(v, float)}
        for tracker in self._trackers:
            tracker.log(values, run.step)
        if run.is_main and run.engine.monitor.enabled:
            run.engine.monitor.write_events(
                [(f"Train/dataflex/{key}", value, run.step * run.global_batch) for key, value in values.items()]
            )

    def on_train_end(self, run: Run) -> None:
        if self._bar is not None:
            self._bar.close()
        if run.is_main and run.output_dir is not None:
            state = {
                "global_step": run.step,
                "max_steps": run.total_steps,
                **self._epoch(run),
                **self.best(),
                "log_history": self.history,
            }
            write_atomically(run.output_dir / "trainer_state.json", json.dumps(state, indent=2))

    def close(self) -> None:
        """End what the trackers were told, after a run that was stopped too."""
        while self._trackers:
            self._trackers.pop().finish()

    def summary(self, run: Run) -> dict[str, float]:
        """The figures of all_results.json: loss, and where the time of all starts of the run went, in seconds."""
        seconds, scored = run.clock.seconds, run.clock.scored
        total = sum(seconds.values())
        scoring = {}
        if scored:
            scoring = {"samples_scored": scored, "samples_scored_per_second": round(scored / seconds[SCORE], 3)}
        return {
            **self._epoch(run),
            "train_loss": self._sum / max(1, self._steps),
            "train_runtime": round(total, 2),
            "train_samples_per_second": round(self._samples / total, 3),
            "train_steps_per_second": round(run.step / total, 3),
            "training_seconds": round(seconds[TRAIN], 2),
            "selection_seconds": round(seconds[SCORE] + seconds[DECIDE], 2),
            **{f"{part}_seconds": round(seconds[part], 2) for part in (SCORE, DECIDE, SAVE, EVALUATE)},
            **scoring,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self.history,
            "losses": self._losses,
            "all": [self._sum, self._steps],
            "samples": self._samples,
            "clock": self.clock.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self._losses = state["history"], state["losses"]
        self._sum, self._steps = state["all"]
        self._samples = state["samples"]
        self.clock.load_state_dict(state["clock"])

    def _entry(self, run: Run) -> dict[str, Any]:
        elapsed = run.clock.total
        per_step = elapsed / run.step
        entry: dict[str, Any] = {
            "current_steps": run.step,
            "total_steps": run.total_steps,
            **({"loss": sum(self._losses) / len(self._losses)} if self._losses else {}),
            "lr": self._rate,
            **self._epoch(run),
            "percentage": round(100 * run.step / run.total_steps, 2),
            "elapsed_time": str(timedelta(seconds=int(elapsed))),
            "remaining_time": str(timedelta(seconds=int(per_step * (run.total_steps - run.step)))),
        }
        norm = run.engine.get_global_grad_norm()
        if norm is not None:
            entry["grad_norm"] = float(norm)
        if run.engine.skipped_steps:
            entry["skipped_steps"] = run.engine.skipped_steps
        return entry | run.figures

    def _epoch(self, run: Run) -> dict[str, float]:
        """``epoch``: samples trained on / samples in the pool; nothing where the data is streamed."""
        size = run.pool.size
        return {} if size is None else {"epoch": round(self._samples / size, 4)}

    def _write(self, run: Run) -> None:
        """Make the file hold the history and nothing else: a resume drops what came after the checkpoint."""
        if run.is_main and run.output_dir is not None:
            lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
            write_atomically(run.output_dir / "trainer_log.jsonl", lines)


@with_config(ConfigDict(extra="allow"))
class LogEntry(TypedDict):
    """A line of trainer_log.jsonl as far as it is read again; the rest stays as it is."""

    current_steps: int
    lr: NotRequired[float]


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run's trainer_log.jsonl. UserError naming the line where there is anything else."""
    try:
        entries: list[dict[str, Any]] = read_lines(folder / "trainer_log.jsonl", LogEntry)
    except DamagedError as error:
        raise UserError(f"{folder}: {error}") from None
    return entries
