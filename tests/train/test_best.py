"""load_best_model_at_end: which checkpoint is the best, that it stays, and what a resume knows of it."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataflex.core.clock import Clock
from dataflex.engine import checkpoint
from dataflex.engine.folder.own_files import CONFIG
from dataflex.train.trainer.best import Best
from dataflex.train.trainer.run_hooks import CheckpointHook, EvalHook
from dataflex.utils.stopping import Stop
from tests.engine.test_many_checkpoints import whole


def log_of() -> Any:
    history: list[dict[str, Any]] = []
    return SimpleNamespace(history=history, add=lambda run, entry: history.append(entry), best=dict)


def trained(out: Path, losses: list[float], keep: int, every: int = 2, greater: bool = False) -> tuple[Best, Any]:
    """A run of as many steps as there are losses, evaluated at every third step and where it is saved."""
    (out / CONFIG).write_text("seed: 1\n")
    run: Any = SimpleNamespace(step=0, total_steps=len(losses), output_dir=out, clock=Clock(), stop=Stop())
    run.engine = SimpleNamespace(
        save_checkpoint=lambda: whole(out / f"checkpoint-{run.step}", run.step),
        evaluate=lambda: {"eval_loss": losses[run.step - 1]},
    )
    log = log_of()
    best = Best("eval_loss", greater, log)
    evaluations, saves = EvalHook(3, log, every), CheckpointHook(every, keep, False, None, best)  # type: ignore[arg-type]
    saves.on_train_start(run)
    for step in range(1, len(losses) + 1):
        run.step = step
        evaluations.on_step_end(run, None)
        saves.on_step_end(run, None)
    return best, saves


def left(out: Path) -> list[int]:
    return sorted(checkpoint.step_of(path) for path in out.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("keep", "losses", "greater", "best", "kept"),
    [
        (1, [9, 5, 1, 4, 9, 6, 9, 7], False, 4, [4, 8]),  # step 3 is better and not saved
        (2, [9, 5, 9, 4, 9, 6, 9, 7], False, 4, [4, 8]),
        (3, [9, 5, 9, 4, 9, 6, 9, 7], False, 4, [4, 6, 8]),
        (1, [9, 5, 9, 4, 9, 3, 9, 2], False, 8, [8]),
        (2, [9, 5, 9, 4, 9, 3, 9, 2], False, 8, [6, 8]),
        (1, [9, 5, 9, 4, 9, 6, 9, 7], True, 8, [8]),
        (1, [9, math.nan, 9, 4, 9, 4, 9, math.nan], False, 4, [4, 8]),
    ],
)
def test_the_best_checkpoint_stays_beside_the_newest(
    tmp_path: Path, keep: int, losses: list[float], greater: bool, best: int, kept: list[int]
) -> None:
    found, _ = trained(tmp_path, losses, keep, greater=greater)
    assert (found.step, left(tmp_path)) == (best, kept)
    assert found.said() == {
        "best_metric": losses[best - 1],
        "best_global_step": best,
        "best_model_checkpoint": f"checkpoint-{best}",
    }


def test_a_checkpoint_that_was_not_evaluated_is_not_the_best() -> None:
    """One that is saved at a stop: the last figure is of weights before."""
    log = log_of()
    best = Best("eval_loss", False, log)
    best.consider(1, "checkpoint-1")
    assert best.step is None and best.said() == {}
    log.history += [{"current_steps": 2, "eval_loss": 3.0}]
    best.consider(2, "checkpoint-2")
    log.history += [{"current_steps": 4, "eval_loss": 1.0}]
    best.consider(5, "checkpoint-5")
    log.history += [{"current_steps": 6, "loss": 0.5}]
    best.consider(6, "checkpoint-6")
    assert (best.step, best.value, best.folder) == (2, 3.0, "checkpoint-2")


def test_a_resume_knows_the_best_and_where_it_lies(tmp_path: Path) -> None:
    _, saves = trained(tmp_path, [9, 5, 9, 4, 9, 6], keep=2)
    again = Best("eval_loss", False, log_of())
    hook = CheckpointHook(2, 2, False, None, again)  # type: ignore[arg-type]
    hook.load_state_dict(saves.state_dict())
    assert (again.step, again.value, again.folder) == (4, 4, "checkpoint-4")
    again.came_from(tmp_path)
    assert tmp_path / "elsewhere" / again.folder == tmp_path / "checkpoint-4"
    hook.load_state_dict({})  # of a run that chose none
    assert again.step == 4
    assert CheckpointHook(2, 2, False, None).state_dict() == {}  # type: ignore[arg-type]
