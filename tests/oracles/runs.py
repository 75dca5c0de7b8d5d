"""The runs that `by_hand` computes again: on two ranks, with accumulation, under a clock of their own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from dataflex.config import load_config
from dataflex.driver.training import train
from dataflex.engine.plugin import DataflexEngine
from tests.driver.workspace import settings
from tests.oracles import by_hand

STEP_S, EVALUATION_S = 2.0, 3.0
LR = 0.05
BASE: dict[str, Any] = {
    "finetuning_type": "full",
    "template": "default",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "save_strategy": "no",
}
LOGGED: dict[str, Any] = {
    **BASE,
    "deepspeed": "ds_zero2.json",
    "eval_dataset": ["near", "far"],
    "per_device_eval_batch_size": 2,
    "train_type": "dynamic_mix",
    "static_mix": True,
    "init_mixture_proportions": [1, 1],
    "max_steps": by_hand.STEPS,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "learning_rate": by_hand.RATE,
    "lr_scheduler_type": "linear",
    "warmup_steps": by_hand.WARMUP,
    "weight_decay": by_hand.DECAY,
    "max_grad_norm": by_hand.CLIP,
    "adam_beta1": by_hand.BETAS[0],
    "adam_beta2": by_hand.BETAS[1],
    "adam_epsilon": by_hand.EPSILON,
}
OWN_LOSS: dict[str, Any] = {
    **BASE,
    "per_device_train_batch_size": 2,
    "train_type": "dynamic_weight",
    "component_name": "own_loss",
    "max_steps": 2,
    "logging_steps": 1,
    "optim": "sgd",
    "learning_rate": LR,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1e9,
}
OWN_PART = '''
from dataflex.core.registry import register_weighter
from dataflex.train.weighter.base_weighter import Weighter


@register_weighter("own_loss")
class OwnLoss(Weighter):
    """Something that cannot be had by weights: the mean square of the samples' losses, and the largest of them."""

    def get_weighted_loss(self, losses, *, ctx=None, model=None, inputs=None):
        return (losses**2).mean() + losses.max()
'''
CASES: dict[str, dict[str, Any]] = {
    "logged": LOGGED,
    **{f"own loss z{stage}": {**OWN_LOSS, "deepspeed": f"ds_zero{stage}.json"} for stage in (0, 2)},
}


def run_all(folder: str) -> dict[str, list[list[int]]]:
    """Train each case into its folder; {case: the global batches}. Runs on each rank."""
    return {name: _run(Path(folder), name, keys) for name, keys in CASES.items()}


def _run(folder: Path, name: str, keys: dict[str, Any]) -> list[list[int]]:
    """A step takes 2 s and an evaluation 3 s by the clock, and nothing else takes any time."""
    now = 100.0
    plan: list[list[int]] = []
    step, evaluate = DataflexEngine.training_step, DataflexEngine.evaluate

    def timed_step(engine: Any, batch: Any) -> float:
        nonlocal now
        plan.append(batch.sample_ids.tolist())
        now += STEP_S
        return step(engine, batch)

    def timed_evaluation(engine: Any) -> dict[str, float]:
        nonlocal now
        now += EVALUATION_S
        return evaluate(engine)

    own = {"component_modules": [str(folder / "own_loss.py")]} if "component_name" in keys else {}
    cfg = load_config(settings(folder, **keys, **own, output_dir=str(folder / name)), quiet=True)
    with (
        mock.patch.object(DataflexEngine, "training_step", timed_step),
        mock.patch.object(DataflexEngine, "evaluate", timed_evaluation),
        mock.patch("dataflex.core.clock.time", SimpleNamespace(monotonic=lambda: now)),
    ):
        train(cfg)
    return plan
