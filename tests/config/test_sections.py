"""What fields mean where they are a share, or stand for another field."""

from __future__ import annotations

import pytest

from dataflex.config import load_config
from dataflex.config.schema import OutputSection
from dataflex.config.sections.steps import steps_of
from dataflex.config.sections.train import TrainSection


@pytest.mark.parametrize(
    ("asked", "total", "steps"),
    [(0.1, 25, 3), (0.5, 5, 3), (0.001, 40, 1), (0.25, 8, 2), (1, 40, 1), (1.0, 40, 1), (7, 3, 7)],
)
def test_a_share_of_all_steps_is_rounded_up_and_one_is_a_step(asked: float, total: int, steps: int) -> None:
    kept = OutputSection.model_validate({"save_steps": asked}).save_steps
    assert steps_of(kept, total) == steps


def test_the_order_has_a_seed_of_its_own_if_asked_for() -> None:
    assert TrainSection(seed=3).order_seed == 3
    assert TrainSection(seed=3, data_seed=5).order_seed == 5
    assert TrainSection(seed=3, data_seed=0).order_seed == 0


def test_one_dataset_is_trained_on_as_it_is_whatever_would_be_interleaved() -> None:
    keys = {"model_name_or_path": "m", "output_dir": "out", "mix_strategy": "interleave_under"}
    assert load_config(keys | {"dataset": "a,b"}, quiet=True).flex.kinds == ("mix",)
    assert load_config(keys | {"dataset": "a"}, quiet=True).flex.kinds == ()
