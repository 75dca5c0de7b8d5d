"""`DataflexEngine`: a DeepSpeed engine with data decisions around it, by delegation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.core.context import Run
from dataflex.core.hook import Planner
from dataflex.core.plan import Plan
from dataflex.engine import checkpoint
from dataflex.engine.batches import StepBatch
from dataflex.engine.loop import Loop
from dataflex.scoring.scorer import Scorer
from dataflex.utils import dist
from dataflex.utils.errors import UserError


class DataflexEngine:
    """Passes everything but the methods below through to the wrapped DeepSpeed engine (``self.engine``).

    ::

        for batch in engine.batches():
            loss = engine.training_step(batch)
    """

    def __init__(
        self, engine: Any, run: Run, loop: Loop, scorer: Scorer, eval_pool: Any = None, eval_batch: int = 8
    ) -> None:
        self.engine = engine
        self.run = run
        self.scorer = scorer
        self.eval_pool = eval_pool
        self.eval_batch = eval_batch
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        if name == "engine":
            raise AttributeError(name)
        return getattr(self.engine, name)

    @property
    def planner(self) -> Planner:
        """The hook that decides what is trained on; a `SelectPlanner` has the selector."""
        return self._loop.planner

    @property
    def loss_is_per(self) -> str:
        """What a step's loss is the mean over: ``token`` or ``sample``."""
        return "token" if self._loop.stepper.normalization == "tokens" else "sample"

    def batches(self) -> Iterator[StepBatch]:
        """One item per optimizer step, following the plan; ends when the schedule ends.

        Selectors and mixers are asked between items. Every item must be passed to `training_step`.
        """
        return self._loop.batches()

    def training_step(self, batch: StepBatch) -> float:
        """Forward, per-sample loss, weighting, backward, optimizer step and hooks; the global batch's loss."""
        return self._loop.training_step(batch)

    def trial_step(self) -> float:
        """Seconds of an optimizer step on the pool's first samples, the second of two; a collective.

        It changes the weights and nothing is saved: for a process that ends without training.
        """
        run = self.run
        ids = run.pool.first_ids(2 * run.global_batch)
        plan = Plan(ids, np.full(len(ids), 1 / (run.pool.size or len(ids))))
        seconds = 0.0
        for batch in self._loop.source.batches(plan, 0, 2):
            started = time.monotonic()
            self._loop.stepper.step(batch)
            seconds = time.monotonic() - started
        return max(dist.gather_objects(seconds))

    def evaluate(self) -> dict[str, float]:
        """Token-mean loss of the eval dataset: ``eval_loss``, and ``eval_<domain>_loss`` where it has several.

        Leaves the training state bit-identical; call it on every rank, between steps.
        """
        pool = self.eval_pool
        if pool is None:
            raise UserError("evaluate: no eval_dataset was given")
        scored = self.scorer.losses(pool, reduction="sum", max_samples=self.eval_batch)
        losses, counts = (values.astype(np.float64) for values in scored)
        result = {"eval_loss": float(losses.sum() / counts.sum())}
        if len(pool.domain_names) > 1:
            for d, name in enumerate(pool.domain_names):
                mine = np.asarray(pool.domain_ids) == d
                result[f"eval_{name}_loss"] = float(losses[mine].sum() / max(1.0, counts[mine].sum()))
        return result

    def save_checkpoint(
        self,
        save_dir: str | Path | None = None,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
    ) -> Path:
        """Save model, optimizer, plan, hooks and random state under ``save_dir``/``tag``; see `engine.checkpoint`.

        By default into the run's output_dir, as checkpoint-<steps done>. Call it on every rank, between steps.
        """
        folder = self._folder(save_dir) / (tag or f"checkpoint-{self.run.step}")
        checkpoint.save(self.engine, self._loop, folder, client_state or {})
        return folder

    def load_checkpoint(self, load_dir: str | Path | None = None, tag: str | None = None) -> dict[str, Any] | None:
        """Resume from ``load_dir``/``tag``, by default from the newest whole checkpoint there.

        Returns its client_state, or None where there is none (and none was named). Training then goes on
        bit-identically.
        """
        directory = self._folder(load_dir)
        folder = directory / tag if tag else checkpoint.newest_whole(directory)
        return None if folder is None else checkpoint.load(self.engine, self._loop, folder)

    def _folder(self, named: str | Path | None) -> Path:
        folder = named if named is not None else self.run.output_dir
        if folder is None:
            raise UserError("checkpoint: no folder was given and the run has no output_dir")
        return Path(folder)
