"""What planners do where samples are packed: with answers made for the purpose, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dataflex.core.packing import Packing
from dataflex.core.plan import decision_schedule
from dataflex.train.mixer.mixture import MixtureManager
from dataflex.train.trainer.mix_trainer import MixPlanner
from dataflex.train.trainer.sample_trainer import WeightedPlanner
from dataflex.train.trainer.select_trainer import ASKS, SelectPlanner
from dataflex.train.trainer.static_trainer import StaticPlanner
from dataflex.utils.errors import UserError
from tests.train.test_planners import BATCH, DOMAINS, NAMES, Told, make_run, plans

# 50 samples of 3 and 7 tokens in turn: a row of 10 holds one of each, or three short ones.
LENGTHS = np.where(np.arange(50) % 2, 7, 3)
PACKING = Packing(LENGTHS, 10)


SHORT_FIRST = [*range(0, 50, 2), *range(1, 50, 2)]


class Short(Told):
    """Answers with the first of an order, by default that of the lengths."""

    def __init__(self, order: list[int] = SHORT_FIRST) -> None:
        super().__init__()
        self.order = order

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        super().select(model, step_id, num_samples, **kwargs)
        return self.order[:num_samples]


def packed_run(**how: Any) -> Any:
    run = make_run(packing=PACKING, **how)
    run.pool.lengths = LENGTHS
    return run


def rows(plan: Any) -> list[list[int]]:
    return [part.tolist() for part in np.split(plan.sample_ids, plan.starts[1:-1])]


def test_static_training_goes_over_the_packs_epoch_by_epoch() -> None:
    schedule = decision_schedule(warmup_step=25, update_step=1, update_times=0, train_step=None, epoch_steps=1)
    (plan,) = plans(StaticPlanner(), packed_run(schedule=schedule))
    assert plan.rows == 100 and np.bincount(plan.sample_ids).tolist() == [4] * 50
    first, second = rows(plan)[:25], rows(plan)[25:50]
    assert sorted(first) == sorted(second) == sorted(rows(PACKING.pool)) and first != second


def test_a_selector_is_asked_until_its_picks_fill_the_phase() -> None:
    usual, short = Told(), Short()
    made = plans(SelectPlanner(usual, "told"), packed_run())
    assert [plan.rows for plan in made] == [8, 12, 12, 12]
    assert [(ask["step_id"], ask["num_samples"]) for ask in usual.asked] == [(2, 24), (5, 24)]
    assert sorted(made[1].sample_ids) == list(range(24)) and all(len(row) == 2 for row in rows(made[1]))
    # All 25 short ones and five long ones: five pairs, and 20 short ones in seven rows. One more needs a row more.
    made = plans(SelectPlanner(short, "short"), packed_run())
    assert [plan.rows for plan in made] == [8, 12, 12, 12]
    assert sorted(made[1].sample_ids) == sorted(made[2].sample_ids) == sorted(SHORT_FIRST[:30])
    assert len([ask for ask in short.asked if ask["step_id"] == 2]) <= ASKS
    assert sorted(rows(made[3])) == sorted(rows(made[2])) and rows(made[3]) != rows(made[2]), "goes on pack by pack"


def test_what_a_decision_kept_is_dropped_behind_it() -> None:
    class Keeps(Short):
        made = 0

        def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
            self.once(step_id, self.make)
            return super().select(model, step_id, num_samples, **kwargs)

        def make(self) -> int:
            self.made += 1
            return self.made

    selector, run = Keeps(), packed_run()
    planner, phase = SelectPlanner(selector, "keeps"), run.schedule.phases[1]
    for decision in (1, 2):
        planner.plan(run, phase)  # at the same step: of another run in this process, with other weights
        assert selector.made == decision < len(selector.asked)


def test_where_order_is_asked_for_rows_are_next_fit() -> None:
    schedule = decision_schedule(warmup_step=0, update_step=1, update_times=1, train_step=None, epoch_steps=1)
    selector = Short(order=[0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14])
    selector.keep_order = True
    (plan,) = plans(SelectPlanner(selector, "told"), packed_run(schedule=schedule))
    assert rows(plan) == [[0, 2, 4], [6, 1], [3], [5]]


def test_what_a_decision_was_made_from_is_that_of_the_picks_that_are_trained() -> None:
    class Counted(Short):
        def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
            answer = super().select(model, step_id, num_samples, **kwargs)
            self.metric = {"score": [float(num_samples)] * num_samples}
            self.found = self.once(step_id, lambda: len(self.asked))
            return answer

    selector = Counted()
    planner = SelectPlanner(selector, "counted")
    (_, plan, *_) = plans(planner, packed_run())
    assert selector.metric == {"score": [float(len(planner.picks))] * len(planner.picks)}
    assert len(plan.sample_ids) == len(planner.picks)
    assert len(planner.picks) == 30 != selector.asked[-1]["num_samples"]
    second = [number for number, ask in enumerate(selector.asked, start=1) if ask["step_id"] == 5]
    assert selector.found == second[0], "what is kept over the asks of a decision is dropped after it"


def test_picks_survive_a_resume_with_their_rows() -> None:
    run = packed_run()
    planner, fresh = SelectPlanner(Told(), "told"), SelectPlanner(Told(), "told")
    plans(planner, run)
    fresh.load_state_dict(planner.state_dict())
    again, here = (one.plan(run, run.schedule.phases[3]) for one in (fresh, planner))
    assert rows(again) == rows(here)


def test_a_pool_with_fewer_packs_than_a_decision_is_refused_before_training() -> None:
    schedule = decision_schedule(warmup_step=0, update_step=7, update_times=1, train_step=None, epoch_steps=1)
    with pytest.raises(UserError, match="= 28 packs without replacement, the pool has 25"):
        SelectPlanner(Told(), "told").on_train_start(packed_run(schedule=schedule))


def test_a_warm_up_of_the_selectors_own_fills_its_packs() -> None:
    class Warm(Told):
        def warmup(self, num_samples: int, replacement: bool = False) -> list[int]:
            return np.resize(np.arange(0, 50, 2), num_samples).tolist()

    plan = plans(SelectPlanner(Warm(), "warm"), packed_run())[0]
    assert plan.rows == 2 * BATCH
    assert sorted(plan.sample_ids) == list(range(0, 48, 2)), "three short ones in each of eight rows"


def test_mixing_takes_as_many_as_fit_and_no_domain_beyond_its_size() -> None:
    mixture = MixtureManager(DOMAINS, NAMES, np.array([0.2, 0.5, 0.3]), 3)
    made = plans(MixPlanner(mixture, None, "static"), packed_run())
    counts = [np.bincount(DOMAINS[plan.sample_ids], minlength=3) for plan in made]
    assert [plan.rows for plan in made] == [8, 12, 12, 12]
    for plan, count in zip(made, counts, strict=True):
        assert np.abs(count - np.array([0.2, 0.5, 0.3]) * len(plan.sample_ids)).max() < 1
        assert PACKING.fill(plan) > 0.75
    assert mixture.drawn.tolist() == sum(counts).tolist(), "draws that were only tried are not counted"
    planner = MixPlanner(mixture, None, "static")
    planner.selection = SelectPlanner(Told(), "told")
    assert mixture.most(np.array([0.2, 0.5, 0.3])) == 20, "4 of 5, and a fifth of them all"
    with pytest.raises(
        UserError, match=r"12 packs are to be filled, and in the mixer's proportions only 8 samples can"
    ):
        mixture.proportions = np.array([0.5, 0.5, 0.0])
        plans(planner, packed_run())


@pytest.mark.parametrize("replacement", [True, False])
def test_weighted_draws_fill_their_packs(replacement: bool) -> None:
    probabilities = np.where(np.arange(50) < 40, 1.0, 0.0) / 40
    planner = WeightedPlanner(probabilities, replacement)
    run = packed_run()
    planner.on_train_start(run)
    for plan, phase in zip(plans(planner, run), run.schedule.phases, strict=True):
        assert plan.rows == phase.steps * BATCH and set(plan.sample_ids) <= set(range(40))
        assert replacement or len(set(plan.sample_ids)) == len(plan.sample_ids)
    if not replacement:
        run.schedule = decision_schedule(warmup_step=6, update_step=1, update_times=0, train_step=None, epoch_steps=1)
        with pytest.raises(UserError, match="draws 24 distinct packs .* the pool has 20 with a weight > 0"):
            planner.on_train_start(run)
