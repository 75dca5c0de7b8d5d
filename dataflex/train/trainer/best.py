"""Which checkpoint is the best of a run, and what is handed over of it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataflex.config import Config
from dataflex.config.rules.best import metric_of
from dataflex.core.context import Run
from dataflex.engine import checkpoint
from dataflex.engine.models.export import export
from dataflex.engine.models.handover import Handover
from dataflex.report.trainer_log import LogHook
from dataflex.utils import dist
from dataflex.utils.logging import logger
from dataflex.utils.room import said_when_full


class Best:
    """The best checkpoint so far. step: after which it was saved, None before there is one; of equal ones the first.

    metric: a figure of the evaluations in ``log``. greater: whether more of it is better. folder: in the run's
    output_dir, or absolute where it is in another's, of which this run is a resume.
    """

    def __init__(self, metric: str, greater: bool, log: LogHook) -> None:
        self.metric, self.greater, self.log = metric, greater, log
        log.best = self.said
        self.step: int | None = None
        self.value = math.nan
        self.folder = ""

    @classmethod
    def asked(cls, cfg: Config, log: LogHook) -> Best | None:
        """What load_best_model_at_end asks for."""
        if not cfg.output.load_best_model_at_end:
            return None
        return cls(metric_of(cfg.output, cfg.data), bool(cfg.output.greater_is_better), log)

    def consider(self, step: int, folder: str) -> None:
        """Take the checkpoint that is about to be saved, if its figure is the best so far; NaN never is.

        One that is saved at a stop may not have been evaluated.
        """
        entry = self.log.history[-1] if self.log.history else {}
        if entry.get("current_steps") != step or self.metric not in entry:
            return
        value = entry[self.metric]
        better = value > self.value if self.greater else value < self.value
        if better or (self.step is None and not math.isnan(value)):
            self.step, self.value, self.folder = step, value, folder

    def came_from(self, other: Path) -> None:
        """The run goes on from a checkpoint in ``other``, the output_dir of another run."""
        if self.step is not None:
            self.folder = str((other / self.folder).resolve())

    def said(self) -> dict[str, Any]:
        """As transformers' trainer_state.json has it; nothing before there is one."""
        if self.step is None:
            return {}
        return {"best_metric": self.value, "best_global_step": self.step, "best_model_checkpoint": self.folder}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "value": self.value, "folder": self.folder}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of a checkpoint that knew of no best one: nothing is known."""
        if state:
            self.step, self.value, self.folder = state["step"], state["value"], state["folder"]


def hand_over(engine: Any, handover: Handover, best: Best | None, only_model: bool) -> int:
    """Export the best checkpoint's weights into output_dir, or those after the last step; the step. A collective.

    only_model: checkpoints are exported models. A best checkpoint that is gone is said, and the last weights are taken.
    """
    run: Run = engine.run
    assert run.output_dir is not None
    if best is None or best.step in (None, run.step) or not _still_there(run.output_dir / best.folder, only_model):
        export(engine, run.output_dir, handover)
        return run.step
    source = run.output_dir / best.folder
    if only_model:
        if dist.is_main():
            with said_when_full(run.output_dir, "the trained model"):
                _copy(sorted(source.iterdir()), run.output_dir)
        dist.barrier()
    else:
        checkpoint.load_weights(engine.engine, source)
        export(engine, run.output_dir, handover)
    logger.info(f"exported the best checkpoint: {source}, {best.metric} {best.value:.4g}")
    assert best.step is not None
    return best.step


def _still_there(folder: Path, only_model: bool) -> bool:
    problem = None
    if dist.is_main():
        problem = ("it is gone" if not folder.is_dir() else None) if only_model else checkpoint.broken(folder)
    problem = dist.broadcast_object(problem)
    if problem:
        logger.warning(f"{folder}, the best checkpoint: {problem}; the weights after the last step are exported")
    return problem is None


def _copy(sources: Sequence[Path], folder: Path) -> None:
    for path in sources:
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, folder / path.name)
