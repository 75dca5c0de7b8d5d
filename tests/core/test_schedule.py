"""When decisions fall and how long runs are: every key of design section 4."""

from __future__ import annotations

from typing import Any

import pytest

from dataflex.config import load_config
from dataflex.core.plan import Schedule, decision_schedule, epoch_schedule
from dataflex.train.trainer.build import make_schedule
from dataflex.utils.errors import UserError

GLOBAL_BATCH = 8
POOL = 100
EPOCH_STEPS = 13


def phases(schedule: Schedule) -> list[tuple[int, int, int]]:
    """(first step, steps, decision) of each phase; the decision is negative where it goes on with an earlier one."""
    return [(p.start, p.steps, p.decision if p.decides or not p.decision else -p.decision) for p in schedule.phases]


def decisions(**keys: Any) -> list[tuple[int, int, int]]:
    keys = {"warmup_step": 0, "update_times": -1, "train_step": None, "epoch_steps": EPOCH_STEPS} | keys
    return phases(decision_schedule(**keys))


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ({"warmup_step": 4, "update_step": 3, "update_times": 2}, [(0, 4, 0), (4, 3, 1), (7, 3, 2)]),
        ({"update_step": 3, "update_times": 2}, [(0, 3, 1), (3, 3, 2)]),
        ({"update_step": 1, "update_times": 3}, [(0, 1, 1), (1, 1, 2), (2, 1, 3)]),
        ({"update_step": 5}, [(0, 5, 1), (5, 5, 2), (10, 3, 3)]),
        ({"warmup_step": 4, "update_step": 5}, [(0, 4, 0), (4, 5, 1), (9, 4, 2)]),
        ({"warmup_step": 2, "update_step": 4, "train_step": 8}, [(0, 2, 0), (2, 4, 1), (6, 2, 2)]),
        (
            {"warmup_step": 2, "update_step": 3, "update_times": 2, "train_step": 6},
            [(0, 2, 0), (2, 3, 1), (5, 1, 2)],
        ),
        ({"warmup_step": 2, "update_step": 3, "update_times": 3, "train_step": 5}, [(0, 2, 0), (2, 3, 1)]),
        (
            {"warmup_step": 2, "update_step": 3, "update_times": 2, "train_step": 15},
            [(0, 2, 0), (2, 3, 1), (5, 3, 2), (8, 3, -2), (11, 3, -2), (14, 1, -2)],
        ),
        ({"warmup_step": 5, "update_step": 3, "update_times": 2, "train_step": 4}, [(0, 4, 0)]),
        ({"update_step": 50, "update_times": -1}, [(0, 13, 1)]),
    ],
)
def test_phases_of_selection_and_mixing(keys: dict[str, int], want: list[tuple[int, int, int]]) -> None:
    assert decisions(**keys) == want


@pytest.mark.parametrize("update_step", [0, -3])
def test_update_step_must_be_positive(update_step: int) -> None:
    with pytest.raises(UserError, match=f"update_step: must be > 0, got {update_step}"):
        decisions(update_step=update_step)


def test_static_phases_are_epochs() -> None:
    assert phases(epoch_schedule(30, 13)) == [(0, 13, 0), (13, 13, 0), (26, 4, 0)]
    assert phases(epoch_schedule(5, 13)) == [(0, 5, 0)]
    assert epoch_schedule(26, 13).decisions == 0


def test_every_step_belongs_to_one_phase() -> None:
    schedule = decision_schedule(warmup_step=2, update_step=3, update_times=2, train_step=15, epoch_steps=1)
    found = "".join(str(schedule.phase_at(step).index) for step in range(15))
    assert found == "001112223334445"
    assert schedule.decisions == 2 and schedule.total_steps == 15
    with pytest.raises(AssertionError, match="past the end"):
        schedule.phase_at(15)


def schedule_of(**keys: Any) -> Schedule:
    """The schedule of a config over POOL samples in global batches of GLOBAL_BATCH."""
    cfg = load_config(keys, embedded=True, quiet=True)
    return make_schedule(
        cfg.flex,
        pool_size=POOL,
        global_batch=GLOBAL_BATCH,
        epochs=cfg.train.num_train_epochs,
        fixed=cfg.fixed_steps,
    )


SELECT = {"train_type": "dynamic_select", "component_name": "random", "warmup_step": 4, "update_step": 3}
MIX = SELECT | {"train_type": "dynamic_mix"}
WEIGHT = {"train_type": "dynamic_weight", "component_name": "loss", "warmup_step": 4}
FIXED = {"train_type": "dynamic_mix", "static_mix": True}


@pytest.mark.parametrize(
    ("keys", "total", "decisions_at"),
    [
        ({}, 39, []),
        ({"num_train_epochs": 1}, 13, []),
        ({"num_train_epochs": 0.5}, 7, []),
        ({"train_step": 5}, 5, []),
        ({"max_steps": 6, "num_train_epochs": 1}, 6, []),
        (SELECT | {"update_times": 2}, 10, [4, 7]),
        (SELECT | {"update_times": 2, "num_train_epochs": 9}, 10, [4, 7]),
        (SELECT | {"update_times": 2, "train_step": 20}, 20, [4, 7]),
        (SELECT | {"update_times": 2, "max_steps": 8}, 8, [4, 7]),
        (SELECT | {"update_times": 2, "train_step": 6}, 6, [4]),
        (SELECT | {"num_train_epochs": 1}, 13, [4, 7, 10]),
        (SELECT | {"update_times": -1, "train_step": 11}, 11, [4, 7, 10]),
        (SELECT | {"warmup_step": 0, "update_times": 2}, 6, [0, 3]),
        (MIX | {"update_times": 2}, 10, [4, 7]),
        (MIX | {"update_times": 2, "train_step": 20}, 20, [4, 7]),
        (MIX | {"num_train_epochs": 1}, 13, [4, 7, 10]),
        (MIX | {"init_mixture_proportions": [1, 2], "update_times": 1}, 7, [4]),
        (FIXED, 39, []),
        (FIXED | {"train_step": 9}, 9, []),
        (FIXED | {"warmup_step": 4, "update_step": 3, "update_times": 2}, 10, []),
        (FIXED | {"warmup_step": 4, "update_step": 3}, 39, []),
        ({"train_type": "dynamic_mix", "mixture_sample_rule": "stratified", "num_train_epochs": 1}, 13, []),
        ({"train_type": "dynamic_mix", "mixture_sample_rule": "uniform", "train_step": 3}, 3, []),
        (WEIGHT, 39, []),
        (WEIGHT | {"train_step": 9}, 9, []),
        (WEIGHT | {"num_train_epochs": 1}, 13, []),
        (
            SELECT
            | {
                "train_type": ["dynamic_select", "dynamic_weight"],
                "component_name": {"select": "random", "weight": "loss"},
                "update_times": 2,
            },
            10,
            [4, 7],
        ),
    ],
)
def test_steps_and_decisions_of_each_train_type(keys: dict[str, Any], total: int, decisions_at: list[int]) -> None:
    schedule = schedule_of(**keys)
    assert schedule.total_steps == total
    assert [p.start for p in schedule.phases if p.decides] == decisions_at
    assert schedule.decisions == len(decisions_at)


@pytest.mark.parametrize("keys", [SELECT, MIX, WEIGHT])
def test_a_warm_up_as_long_as_the_run_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(UserError) as failure:
        schedule_of(**(keys | {"num_train_epochs": 1, "warmup_step": 13}))
    assert str(failure.value) == "warmup_step: 13 leaves no step after the warm-up: the run ends after 13 steps"


def test_a_decision_picks_update_step_times_global_batch_samples() -> None:
    schedule = schedule_of(**(SELECT | {"update_times": 2}))
    assert [p.steps * GLOBAL_BATCH for p in schedule.phases] == [32, 24, 24]
