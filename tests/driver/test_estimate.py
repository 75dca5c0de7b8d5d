"""A dry run's figures against the run itself: its first steps, which are slow, are not what is multiplied."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.config import load_config
from dataflex.data.pool import Pool
from dataflex.driver import estimate
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


def test_a_pass_is_estimated_by_tokens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A batch of 4 short samples, 100 tokens in 2 s, tells 20 s of 10 samples with 1,000 tokens: not 5 s by samples."""
    probe = SimpleNamespace(seconds=2.0, samples=4, tokens=100, row_bytes=8)
    monkeypatch.setattr(estimate, "_probe", lambda pool, engine: probe)
    pool = Pool(range(10), np.zeros(10, dtype=np.int64), ["a"], np.full(10, 100), "f00d")
    score = SimpleNamespace(score_token_losses=True, keep_features=False)
    inputs: Any = SimpleNamespace(data=SimpleNamespace(train=pool), cfg=SimpleNamespace(score=score))
    engine: Any = SimpleNamespace(run=SimpleNamespace(packing=None, schedule=SimpleNamespace(phases=[])), planner=None)
    estimate.estimate(inputs, engine, training=False)
    said = capsys.readouterr().err
    assert "scoring: 0:00:20 a pass, 1 passes = 0:00:20 (2.0 samples/s, 50 tokens/s in a batch of 4 samples)" in said
    assert "disk: 3.9 KiB of token losses a pass" in said
