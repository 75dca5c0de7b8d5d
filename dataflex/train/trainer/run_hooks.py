"""Hooks of a YAML run: evaluation and checkpoints on schedule."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dataflex.core.clock import EVALUATE, SAVE
from dataflex.core.context import Run
from dataflex.core.hook import Hook
from dataflex.engine import checkpoint
from dataflex.engine.folder.own_files import CONFIG
from dataflex.engine.models.export import export
from dataflex.engine.models.handover import Handover
from dataflex.report.trainer_log import LogHook
from dataflex.train.trainer.best import Best
from dataflex.utils import dist
from dataflex.utils.files import finish_removals, remove, write_atomically
from dataflex.utils.logging import logger


def due(run: Run, every: int) -> bool:
    """Whether the step just finished is a multiple of ``every`` or the last one."""
    return run.step % every == 0 or run.step == run.total_steps


SHOWN = 12


class EvalHook(Hook):
    """Evaluates before the first step, every ``every`` steps and after the last; results go to ``log``.

    also_every: the same of further steps, those of the checkpoints where the best is chosen.
    """

    def __init__(self, every: int, log: LogHook, also_every: int | None = None) -> None:
        self.every = (every, also_every or every)
        self.log = log

    def on_train_start(self, run: Run) -> None:
        if run.step == 0:
            self._evaluate(run)

    def on_step_end(self, run: Run, batch: Any) -> None:
        if any(due(run, every) for every in self.every):
            self._evaluate(run)

    def _evaluate(self, run: Run) -> None:
        with run.clock.part(EVALUATE):
            result = run.engine.evaluate()
        self.log.add(run, {"current_steps": run.step, "total_steps": run.total_steps, **result})
        words = [f"{k} {v:.4f}" for k, v in result.items()]
        more = [f"{len(words) - SHOWN} more in the log"] if len(words) > SHOWN else []
        logger.info(f"step {run.step}: " + ", ".join(words[:SHOWN] + more))


class CheckpointHook(Hook):
    """Saves every ``every`` steps, after the last and at a stop; keeps the newest ``keep`` (None: all) whole ones.

    only_model: write a Hugging Face folder that cannot be resumed from instead. best: is kept up to date, and its
    checkpoint stays, as one of ``keep`` if these are more than one.
    """

    def __init__(
        self, every: int, keep: int | None, only_model: bool, handover: Handover, best: Best | None = None
    ) -> None:
        self.every, self.keep, self.only_model = every, keep, only_model
        self.handover, self.best = handover, best

    def on_train_start(self, run: Run) -> None:
        """config.yaml as the run has written it, whatever becomes of the file while it trains."""
        assert run.output_dir is not None
        if dist.is_main() and not self.only_model:
            self.config = (run.output_dir / CONFIG).read_text(encoding="utf-8")

    def on_step_end(self, run: Run, batch: Any) -> None:
        stop = run.stop
        if stop.verdict != "leave" and (due(run, self.every) or (stop.verdict and not self.only_model)):
            start = time.monotonic()
            with run.clock.part(SAVE):
                self._save(run)
            stop.save_s = time.monotonic() - start

    def _save(self, run: Run) -> None:
        assert run.output_dir is not None
        folder = run.output_dir / f"checkpoint-{run.step}"
        if self.best is not None:  # before the state is saved, which then knows of it
            self.best.consider(run.step, folder.name)
        if self.only_model:
            export(run.engine, folder, self.handover)
        else:
            if dist.is_main():  # before the manifest, which then holds for it too
                write_atomically(folder / CONFIG, self.config)
            run.engine.save_checkpoint()
            run.stop.last = folder
        logger.info(f"step {run.step}: saved {folder}")
        if dist.is_main():
            finish_removals(run.output_dir)
            for old in self._superseded(run.output_dir, folder):
                remove(old)
        dist.barrier()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.best is None else {"best": self.best.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.best is not None:
            self.best.load_state_dict(state.get("best", {}))

    def _superseded(self, output_dir: Path, newest: Path) -> list[Path]:
        """The checkpoints that ``newest`` makes useless: beyond ``keep``, and older ones that are not whole."""
        saved = sorted(output_dir.glob("checkpoint-*"), key=checkpoint.step_of)
        older = [p for p in saved if checkpoint.step_of(p) < checkpoint.step_of(newest)]
        ruins = [p for p in older if checkpoint.unfinished(p)]
        whole = [p for p in saved if self.only_model or (p / checkpoint.MANIFEST).exists()]
        if self.keep is None:
            return ruins
        best = None if self.best is None else output_dir / self.best.folder
        others = [p for p in whole if p not in ruins and p != best]
        kept = self.keep - (best in whole)
        kept = kept if best == newest else max(1, kept)  # the newest is what a resume goes on from
        return ruins + others[: max(0, len(others) - kept)]
