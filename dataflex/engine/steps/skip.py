"""A step without an update: gradients are dropped and the schedule goes on; weights and optimizer state stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from dataflex.core.context import Run
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger


@dataclass
class NonFinite:
    """What a step with a loss or gradient that is not finite leads to.

    policy: ``stop``, or ``skip`` for at most ``limit`` steps in a row.
    """

    policy: str = "stop"
    limit: int = 10
    in_a_row: int = 0

    def met(self, run: Run, what: str) -> None:
        """Say that the step will be skipped, or raise UserError. what: what is not finite, with its verb."""
        self.in_a_row += 1
        if self.policy == "stop":
            raise UserError(
                f"step {run.step + 1}: {what} not finite; nothing was saved over the last good checkpoint (nonfinite: "
                "skip goes on without such steps)"
            )
        if self.in_a_row > self.limit:
            raise UserError(
                f"step {run.step + 1}: {what} not finite, and {self.limit} steps before it were skipped for that "
                "(nonfinite_limit); nothing was saved over the last good checkpoint"
            )
        logger.warning(f"step {run.step + 1}: {what} not finite; skipped, nothing but the schedule moves")


def step_without_update(engine: Any, *arguments: Any, **named: Any) -> None:
    """``engine.step(...)`` at the end of a step's last micro-batch, at which the optimizer changes nothing.

    DeepSpeed counts the step as skipped and moves the learning rate on; what it has reduced of the gradients is
    dropped. There is then no gradient norm.
    """
    optimizer = engine.optimizer
    # Schedulers of torch warn where no optimizer step came before theirs.
    getattr(optimizer, "optimizer", optimizer)._opt_called = True
    with _replaced(optimizer, step=partial(_drop_gradients, optimizer, optimizer.step)):
        engine.step(*arguments, **named)
    engine.skipped_steps += 1
    engine._step_applied = False
    engine._global_grad_norm = None


def dropped_by_deepspeed(engine: Any) -> bool:
    """Whether DeepSpeed has just left out an update because of gradients that are not finite, but not in fp16.

    There that is how it finds the loss scale.
    """
    return not engine.fp16_enabled() and bool(getattr(engine.optimizer, "overflow", False))


def advance_schedule(engine: Any) -> None:
    """After an update that DeepSpeed left out: the learning rate goes on all the same.

    There is no gradient norm; DeepSpeed's is still that of the step before.
    """
    engine._global_grad_norm = None
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.step()


def _drop_gradients(optimizer: Any, step: Any) -> None:
    """Drop them as the optimizer drops those that overflowed, but leave the loss scale as it is.

    ZeRO's do so inside their step, which then ends before its update; ZeRO-0's hold gradients at the parameters.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def overflow(**_: Any) -> None:
        optimizer.overflow = True

    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        tracker = getattr(optimizer, "inf_or_nan_tracker", None)
        if tracker is not None:
            tracker.zero_()
        with _replaced(optimizer, _overflow_check_and_loss_scale_update=overflow, _update_scale=_leave_scale):
            step()
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        with _replaced(optimizer, check_overflow=overflow, check_grad_overflow=True, _update_scale=_leave_scale):
            step()
    elif isinstance(optimizer, BF16_Optimizer):
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()
    else:
        optimizer.zero_grad(set_to_none=True)
    if hasattr(optimizer, "overflow"):
        optimizer.overflow = False


def _leave_scale(_overflow: bool = False) -> None:
    pass


@contextmanager
def _replaced(thing: Any, **attributes: Any) -> Iterator[None]:
    """``thing`` with other attributes of its own inside."""
    before = {name: vars(thing)[name] for name in attributes if name in vars(thing)}
    vars(thing).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(thing)[name]
        vars(thing).update(before)
