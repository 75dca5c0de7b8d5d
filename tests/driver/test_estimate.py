"""A dry run's figures against the run itself: its first steps, which are slow, are not what is multiplied."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from dataflex.config import load_config
from tests.distributed import run_ranks
from tests.driver.workspace import settings

STEPS = 30


def trial_and_truth(keys: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step as a dry run tells them, and those of a training run; then both where a step's time is known.

    Every step first sleeps as long as ``delays`` says: its last entry from then on.
    """
    from dataflex.driver.setup import build_engine, read_inputs

    inputs = read_inputs(load_config(keys, quiet=True))
    engine = build_engine(inputs)
    stepper = engine._loop.stepper
    step = stepper.step
    found = {"trial": engine.trial_step()}
    started = time.monotonic()
    for batch in engine.batches():
        engine.training_step(batch)
    found["truth"] = (time.monotonic() - started) / STEPS
    delays = [1.0, 1.0, 0.5, 0.04]

    def slow_at_first(batch: Any) -> float:
        time.sleep(delays.pop(0) if len(delays) > 1 else delays[0])
        return 0.0

    stepper.step = slow_at_first
    found["asleep"] = engine.trial_step()
    stepper.step = step
    return found


def test_a_trial_tells_what_a_step_takes_once_it_is_warm(workspace: Path) -> None:
    keys = settings(workspace, max_steps=STEPS, save_strategy="no", deepspeed="ds_zero0.json")
    found = run_ranks("tests.driver.test_estimate:trial_and_truth", 1, keys=keys)[0]
    assert found["asleep"] == pytest.approx(0.05, abs=0.04), "sleeps, and the time of making a batch"
    assert found["trial"] / found["truth"] == pytest.approx(1, abs=0.6)


def trial_of_a_weighter(keys: dict[str, Any]) -> float:
    from dataflex.driver.setup import build_engine, read_inputs, with_components

    return build_engine(read_inputs(with_components(load_config(keys, quiet=True)))).trial_step()


def test_a_weighter_that_scores_before_a_step_has_a_trial(workspace: Path) -> None:
    adapt = {"train_type": "dynamic_weight", "component_name": "adapt", "val_size": 0.1}
    keys = settings(workspace, max_steps=2, save_strategy="no", deepspeed="ds_zero0.json", **adapt)
    assert run_ranks("tests.driver.test_estimate:trial_of_a_weighter", 1, keys=keys)[0] > 0
