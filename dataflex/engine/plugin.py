"""`DataflexEngine`: a DeepSpeed engine with data decisions around it, by delegation."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.core.context import Run
from dataflex.core.hook import Planner
from dataflex.core.plan import Plan
from dataflex.data.subtasks import Subtasks
from dataflex.engine import checkpoint
from dataflex.engine.steps.batches import MicroBatch, StepBatch
from dataflex.engine.steps.loop import Loop
from dataflex.engine.steps.micro_loop import MicroLoop
from dataflex.scoring.scorer import Scorer
from dataflex.utils import dist
from dataflex.utils.errors import UserError

_PLANNED = "the plan is made for the batch sizes that the engine was made with"
_REFUSED = {
    "compile": "compiled graphs bypass the layers' hooks that scoring needs",
    "train_batch": "it reads batches of its own; iterate over engine.batches()",
    "set_train_batch_size": _PLANNED,
    "set_train_micro_batch_size": _PLANNED,
    "set_gradient_accumulation_steps": _PLANNED,
    "set_gradient_accumulation_boundary": "the plan says where a step ends; call engine.step() for each micro-batch",
}
_WARMING, _TIMED, _TRIAL_S = 3, 20, 10.0


class DataflexEngine:
    """A DeepSpeed engine (``self.engine``) that trains by dataflex's plan; what is not below is passed through to it.

    ::

        for batch in engine.batches():
            loss = engine.training_step(batch)

    or, with the three calls of a DeepSpeed loop::

        for micro in engine.micro_batches():
            loss = engine(micro)
            engine.backward(loss)
            engine.step()
    """

    _OWN = frozenset({"engine", "run", "scorer", "eval_pool", "eval_batch", "_subtasks", "_loop", "_micro"})

    def __init__(
        self,
        engine: Any,
        run: Run,
        loop: Loop,
        scorer: Scorer,
        eval_pool: Any = None,
        eval_batch: int = 8,
        subtasks: Subtasks | None = None,
    ) -> None:
        self.engine = engine
        self.run = run
        self.scorer = scorer
        self.eval_pool = eval_pool
        self.eval_batch = eval_batch
        self._subtasks = None if subtasks is None else (eval_pool, subtasks)
        self._loop = loop
        self._micro = MicroLoop(engine, loop)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """So that ``isinstance(engine, deepspeed.DeepSpeedEngine)`` holds where other code asks for it."""
        return type(self.engine)

    def __getattr__(self, name: str) -> Any:
        if name == "engine":
            raise AttributeError(name)
        value = getattr(self.engine, name)
        return _refusing(name) if name in _REFUSED else value

    def __setattr__(self, name: str, value: Any) -> None:
        """What is DeepSpeed's or the user's is set on the DeepSpeed engine."""
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.engine, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.engine, name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *self._OWN, *dir(self.engine)})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.engine!r})"

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The loss of a micro-batch of `micro_batches`; for other inputs what the model returns, to look at.

        The loss is a scalar with gradient; its mean over a step's micro-batches on all ranks is the step's loss.
        """
        if len(inputs) == 1 and not named and isinstance(inputs[0], MicroBatch):
            return self._micro.forward(inputs[0])
        return self._micro.plain_forward(*inputs, **named)

    forward = __call__

    def backward(self, loss: Any, **how: Any) -> Any:
        """DeepSpeed's ``backward``. UserError for a loss that does not come from ``engine(micro)``."""
        return self._micro.backward(loss, **how)

    def step(self, *arguments: Any, **named: Any) -> None:
        """DeepSpeed's ``step``: the optimizer step and dataflex's hooks after the last micro-batch of a step."""
        self._micro.step(*arguments, **named)

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

    def micro_batches(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches, following the plan; ends when the schedule ends.

        Every item must be trained on: ``loss = engine(micro)``, ``engine.backward(loss)``, ``engine.step()``. The loss
        may be added to before its backward, but not scaled for gradient accumulation: it is already.
        """
        return self._micro.micro_batches()

    def training_step(self, batch: StepBatch) -> float:
        """Forward, per-sample loss, weighting, backward, optimizer step and hooks; the global batch's loss."""
        return self._loop.training_step(batch)

    def trial_step(self) -> float:
        """Seconds of an optimizer step with its batch, on samples from all over the pool; a collective.

        The mean of some steps after a few that are not counted: those allocate, trace and compile. It changes the
        weights and nothing is saved: for a process that ends without training.
        """
        run, steps = self.run, _WARMING + _TIMED
        ids = run.pool.trial_ids(steps * run.global_batch)
        plan = Plan(ids, np.full(len(ids), 1 / (run.pool.size or len(ids))))
        if run.packing is not None:
            plan = run.packing.pool.take(np.random.default_rng(0).integers(run.packing.pool.rows, size=plan.rows))
        seconds: list[float] = []
        started = time.monotonic()
        for batch in self._loop.source.batches(plan, 0, steps):
            for hook in self._loop.hooks:  # a weighter gets ready there
                hook.on_step_start(run, batch)
            self._loop.stepper.step(batch)
            seconds.append(max(dist.gather_objects(time.monotonic() - started)))
            if sum(seconds[_WARMING:]) > _TRIAL_S:
                break
            started = time.monotonic()
        return float(np.mean(seconds[_WARMING:]))

    def evaluate(self) -> dict[str, float]:
        """Token-mean loss of the eval dataset: ``eval_loss``, and ``eval_<domain>_loss`` where it has several.

        With a ``subtask_column``, ``eval_<column>_<value>_loss`` of each of its values as well.
        Leaves the training state bit-identical; call it on every rank, between steps.
        """
        pool = self.eval_pool
        if pool is None:
            raise UserError("evaluate: no eval_dataset was given")
        self._loop.between_steps("evaluate")
        scored = self.scorer.losses(pool, reduction="sum", max_samples=self.eval_batch)
        losses, counts = (values.astype(np.float64) for values in scored)
        result = {"eval_loss": float(losses.sum() / counts.sum())}
        for name, mine in self._eval_parts(pool):
            result[f"eval_{name}_loss"] = float(losses[mine].sum() / max(1.0, counts[mine].sum()))
        return result

    def _eval_parts(self, pool: Any) -> Iterator[tuple[str, np.ndarray]]:
        """(name, mask of the samples) of the parts of an eval dataset whose losses are told beside the mean."""
        if len(pool.domain_names) > 1:
            for d, name in enumerate(pool.domain_names):
                yield name, np.asarray(pool.domain_ids) == d
        if self._subtasks is not None and self._subtasks[0] is pool:
            yield from self._subtasks[1].parts()

    def save_checkpoint(
        self,
        save_dir: str | Path | None = None,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = True,
    ) -> bool:
        """Save model, optimizer, plan, hooks and random state under ``save_dir``/``tag``; see `engine.checkpoint`.

        By default into the run's output_dir, as checkpoint-<steps done>. Call it on every rank, between steps; before
        the first one too. Returns True, as DeepSpeed does.
        """
        self._loop.between_steps("save_checkpoint")
        if self.engine.checkpoint_engine.is_decoupled():
            raise UserError(
                "save_checkpoint: the DeepSpeed config saves in the background, so it cannot be said when a checkpoint "
                "is whole; drop checkpoint.writer"
            )
        folder = self._folder(save_dir) / str(tag or f"checkpoint-{self.run.step}")
        how = {"point": save_latest, "without_frozen": exclude_frozen_parameters}
        checkpoint.save(self.engine, self._loop, folder, client_state or {}, **how)
        return True

    def load_checkpoint(
        self, load_dir: str | Path | None = None, tag: str | None = None, *options: Any, **how: Any
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Resume from ``load_dir``/``tag``, by default from the checkpoint that ``latest`` there names.

        Where that one is broken, the newest whole one is taken. Returns (path, client_state) as DeepSpeed does, and
        (None, None) where there is no ``latest``. Training then goes on bit-identically. options, how: DeepSpeed's
        ``load_module_strict``, ``load_optimizer_states``, ``load_lr_scheduler_states``, ``load_module_only`` (nothing
        else is restored) and ``custom_load_fn``. A checkpoint that DeepSpeed wrote without dataflex is loaded as
        DeepSpeed does, and dataflex's own state is left as it is.
        """
        self._loop.between_steps("load_checkpoint")
        if options:  # in DeepSpeed's order
            named = inspect.signature(self.engine.load_checkpoint).bind(load_dir, tag, *options, **how).arguments
            how = {key: value for key, value in named.items() if key not in ("load_dir", "tag")}
        directory = self._folder(load_dir)
        folder = directory / str(tag) if tag is not None else checkpoint.latest(directory)
        if folder is None:
            return None, None
        if dist.broadcast_object(checkpoint.is_plain(folder)):
            return checkpoint.load_plain(self.engine, folder, self.run.step, **how)
        return checkpoint.load(self.engine, self._loop, folder, **how)

    def _folder(self, named: str | Path | None) -> Path:
        folder = named if named is not None else self.run.output_dir
        if folder is None:
            raise UserError("checkpoint: no folder was given and the run has no output_dir")
        return Path(folder)


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(*_arguments: Any, **_named: Any) -> Any:
        raise UserError(f"engine.{name}: not supported: {_REFUSED[name]}")

    return refuse
