"""The hooks between components and the loop, with components and a run made for the purpose."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.core.clock import Clock
from dataflex.core.packing import Packing
from dataflex.core.plan import Phase, Plan, Schedule, decision_schedule, epoch_schedule, largest_remainder
from dataflex.data.pool import Pool
from dataflex.train.mixer.base_mixer import Mixer
from dataflex.train.mixer.mixture import MixtureManager
from dataflex.train.selector.base_selector import Selector
from dataflex.train.trainer.mix_trainer import MixPlanner
from dataflex.train.trainer.select_trainer import SelectPlanner
from dataflex.train.trainer.static_trainer import StaticPlanner
from dataflex.utils.errors import UserError

DOMAINS = np.repeat([0, 1, 2], [5, 30, 15])
NAMES = ["maths", "dates", "units"]
BATCH = 4


def make_run(
    schedule: Schedule | None = None, output_dir: Path | None = None, step: int = 0, packing: Packing | None = None
) -> Any:
    """What planners read of a run."""
    return SimpleNamespace(
        schedule=schedule
        or decision_schedule(warmup_step=2, update_step=3, update_times=2, train_step=11, epoch_steps=1),
        seed=3,
        global_batch=BATCH,
        packing=packing,
        pool=Pool(range(len(DOMAINS)), DOMAINS, NAMES, np.ones(len(DOMAINS)), fingerprint="f00d"),
        engine=SimpleNamespace(module=torch.nn.Linear(1, 1)),
        clock=Clock(),
        step=step,
        output_dir=output_dir,
        is_main=True,
    )


class Told(Selector):
    """Answers what it was told to, and keeps what it was asked."""

    def __init__(self, answer: Any = None, replacement: bool = False) -> None:
        super().__init__(DOMAINS, None, None, "")
        self.answer = answer
        self.replacement = replacement
        self.asked: list[dict[str, Any]] = []

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        self.asked.append({"step_id": step_id, "num_samples": num_samples, **kwargs})
        self.metric = {"score": [0.5] * num_samples}
        answer: list[int] = list(range(num_samples)) if self.answer is None else self.answer
        return answer


def plans(planner: Any, run: Any, trained: bool = False) -> list[Plan]:
    """The plan of each phase; trained: each is also said to have been trained on."""
    made = []
    for phase in run.schedule.phases:
        run.step = phase.start
        made.append(planner.plan(run, phase))
        for index in range(phase.steps if trained else 0):
            planner.on_step_end(run, SimpleNamespace(sample_ids=made[-1].step(index, BATCH)[0]))
    return made


def test_an_epoch_is_whole_steps_and_the_next_one_goes_on_where_its_samples_end() -> None:
    made = plans(StaticPlanner(), make_run(epoch_schedule(26, 13)))
    assert [len(plan.sample_ids) for plan in made] == [52, 52], "50 samples are 13 steps of 4"
    trained = np.concatenate([plan.sample_ids for plan in made])
    assert sorted(trained[:50]) == sorted(trained[50:100]) == list(range(50))
    assert len(set(trained[100:])) == 4


def test_a_selector_is_asked_once_per_decision_for_update_step_global_batches() -> None:
    selector = Told()
    run = make_run()
    made = plans(SelectPlanner(selector, "told", tokenizer="T"), run)
    assert selector.asked == [
        {"step_id": 2, "num_samples": 12, "current_update_times": 1, "update_times": 2, "tokenizer": "T"},
        {"step_id": 5, "num_samples": 12, "current_update_times": 2, "update_times": 2, "tokenizer": "T"},
    ]
    assert [len(plan.sample_ids) for plan in made] == [8, 12, 12, 12]
    assert len(set(made[0].sample_ids)) == 8, "the warm-up draws without replacement"
    for plan in made[1:]:
        assert sorted(plan.sample_ids) == list(range(12))
    assert not np.array_equal(made[2].sample_ids, made[3].sample_ids), "what goes on is shuffled again"


def test_decisions_are_counted_from_one_without_a_warm_up_too() -> None:
    schedule = decision_schedule(warmup_step=0, update_step=3, update_times=2, train_step=6, epoch_steps=1)
    selector = Told()
    plans(SelectPlanner(selector, "told"), make_run(schedule))
    assert [(asked["step_id"], asked["current_update_times"]) for asked in selector.asked] == [(0, 1), (3, 2)]


def test_every_phase_that_goes_on_has_an_order_of_its_own() -> None:
    schedule = decision_schedule(warmup_step=2, update_step=3, update_times=1, train_step=11, epoch_steps=1)
    made = plans(SelectPlanner(Told(), "told"), make_run(schedule))
    orders = {tuple(plan.sample_ids.tolist()) for plan in made[1:]}
    assert len(made) == 4 and len(orders) == 3 and len({tuple(sorted(order)) for order in orders}) == 1


def test_a_longer_or_shorter_phase_goes_on_with_the_last_picks() -> None:
    for train_step, size in ((9, 4), (7, 8)):
        schedule = decision_schedule(warmup_step=2, update_step=3, update_times=1, train_step=train_step, epoch_steps=1)
        last = plans(SelectPlanner(Told(), "told"), make_run(schedule))[-1]
        assert len(last.sample_ids) == size and set(last.sample_ids) <= set(range(12))


def test_keep_order_trains_in_the_order_returned() -> None:
    selector = Told(answer=list(range(20, 32)))
    selector.keep_order = True
    made = plans(SelectPlanner(selector, "told"), make_run())
    assert made[1].sample_ids.tolist() == list(range(20, 32))


def test_plans_are_the_same_for_the_same_seed_and_differ_for_another() -> None:
    first, again, other = make_run(), make_run(), make_run()
    other.seed = 4
    one, two, three = (plans(SelectPlanner(Told(), "told"), run) for run in (first, again, other))
    assert all(np.array_equal(a.sample_ids, b.sample_ids) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[1].sample_ids, three[1].sample_ids)


def test_a_warm_up_longer_than_the_pool_repeats_samples() -> None:
    schedule = decision_schedule(warmup_step=20, update_step=3, update_times=1, train_step=None, epoch_steps=1)
    plan = plans(SelectPlanner(Told(), "told"), make_run(schedule))[0]
    assert len(plan.sample_ids) == 80 and set(plan.sample_ids) <= set(range(50))


def test_a_decision_is_written_with_what_it_was_made_from(tmp_path: Path) -> None:
    run = make_run(output_dir=tmp_path / "run")
    plans(SelectPlanner(Told(), "told"), run)
    files = ["step_2.json", "step_2.parquet", "step_5.json", "step_5.parquet"]
    assert sorted(p.name for p in (tmp_path / "run" / "decisions").iterdir()) == files
    table = pd.read_parquet(tmp_path / "run" / "decisions" / "step_5.parquet")
    assert table.picked.tolist() == [i < 12 for i in range(50)]
    assert table.score.notna().tolist() == [i < 12 for i in range(50)], "what the selector says of its picks"
    written = json.loads((tmp_path / "run" / "decisions" / "step_5.json").read_text())
    assert written["indices"] == list(range(12)) and written["metric"] == {"score": [0.5] * 12}
    assert written["component"] == "told" and written["fingerprint"]["pool"] == "f00d"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([1, 2], "selector 'told' at step 2: asked for 12 sample ids, got 2"),
        ([0] * 12, "selector 'told' at step 2: sample id 0 is returned 12 times"),
        (list(range(49, 61)), "selector 'told' at step 2: sample id 50 at position 1 is out of range; valid: 0 to 49"),
    ],
)
def test_a_wrong_answer_is_refused(answer: list[int], text: str) -> None:
    with pytest.raises(UserError, match=text):
        plans(SelectPlanner(Told(answer), "told"), make_run())


def test_repeats_are_a_selectors_right_when_it_says_so() -> None:
    made = plans(SelectPlanner(Told([7] * 12, replacement=True), "told"), make_run())
    assert made[1].sample_ids.tolist() == [7] * 12
    assert made[1].probabilities.tolist() == [1.0] * 12, "one sample was picked"


def test_a_pool_smaller_than_a_decision_is_refused_before_training() -> None:
    schedule = decision_schedule(warmup_step=0, update_step=13, update_times=1, train_step=None, epoch_steps=1)
    with pytest.raises(UserError, match="= 52 samples without replacement, the pool has 50"):
        SelectPlanner(Told(), "told").on_train_start(make_run(schedule))
    SelectPlanner(Told(replacement=True), "told").on_train_start(make_run(schedule))


def test_more_samples_than_a_selector_can_take_are_refused_before_training() -> None:
    schedule = decision_schedule(warmup_step=2, update_step=10, update_times=1, train_step=12, epoch_steps=1)
    for most, replacement in ((39, True), (40, False), (39, False)):
        told = Told(replacement=replacement)
        told.most_picks, told.limit = most, "max_neighbours"
        if most == 40 or replacement:
            SelectPlanner(told, "told").on_train_start(make_run(schedule))
            continue
        with pytest.raises(UserError, match="^told: max_neighbours: 39 samples may be taken at most .* = 40 samples; "):
            SelectPlanner(told, "told").on_train_start(make_run(schedule))


def test_a_selectors_picks_survive_a_resume() -> None:
    run = make_run()
    planner = SelectPlanner(Told(), "told")
    plans(planner, run)
    fresh = SelectPlanner(Told(), "told")
    fresh.load_state_dict(planner.state_dict())
    goes_on = run.schedule.phases[3]
    assert not goes_on.decides
    assert np.array_equal(fresh.plan(run, goes_on).sample_ids, planner.plan(run, goes_on).sample_ids)


def test_static_training_goes_over_the_pool_epoch_by_epoch() -> None:
    run = make_run(Schedule((Phase(0, 0, 13, 0, False), Phase(1, 13, 12, 0, False))))
    ids = np.concatenate([plan.sample_ids for plan in plans(StaticPlanner(), run)])
    assert sorted(ids[:50]) == sorted(ids[50:100]) == list(range(50))


class Proportions(Mixer):
    def __init__(self, manager: MixtureManager, answers: list[Any]) -> None:
        super().__init__(manager)
        self.answers = answers

    def mix(self, model: Any, step_id: int, **kwargs: Any) -> Any:
        return self.answers.pop(0)


def manager(seed: int = 3) -> MixtureManager:
    return MixtureManager(DOMAINS, NAMES, np.full(3, 1 / 3), seed)


def counts(plan: Plan) -> list[int]:
    return np.bincount(DOMAINS[plan.sample_ids], minlength=3).tolist()


def test_a_phases_domain_counts_are_its_proportions_rounded(tmp_path: Path) -> None:
    mixture = manager()
    mixer = Proportions(mixture, [[0, 3, 1], [5, 2, 0]])
    made = plans(MixPlanner(mixture, mixer, "mine"), make_run(output_dir=tmp_path))
    assert [counts(plan) for plan in made] == [[3, 3, 2], [0, 9, 3], [9, 3, 0], [8, 4, 0]]
    lines = [json.loads(line) for line in (tmp_path / "mine_weights.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 5, 8]
    assert lines[1]["weights"] == {"maths": 0.0, "dates": 0.75, "units": 0.25}


def test_fixed_proportions_are_recorded_in_a_folder_that_did_not_exist(tmp_path: Path) -> None:
    schedule = Schedule((Phase(0, 0, 3, 0, False),))
    (plan,) = plans(MixPlanner(manager(), None, "static"), make_run(schedule, output_dir=tmp_path / "new" / "run"))
    assert counts(plan) == [4, 4, 4]
    assert (tmp_path / "new" / "run" / "static_weights.jsonl").exists()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([0.7, -0.3, 0.6], "mixer 'mine' at step 2: proportion of 'dates' is -0.3"),
        ([1.0, 2.0], "mixer 'mine' at step 2: needs 3 proportions"),
        ([float("nan")] * 3, "mixer 'mine' at step 2: proportion of 'maths' is nan"),
        (None, "mixer 'mine' at step 2: needs 3 proportions"),
    ],
)
def test_wrong_proportions_are_refused(answer: Any, text: str) -> None:
    mixture = manager()
    with pytest.raises(UserError, match=text):
        plans(MixPlanner(mixture, Proportions(mixture, [answer]), "mine"), make_run())


@settings(max_examples=60, deadline=None)
@given(
    phases=st.lists(
        st.tuples(
            st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda p: sum(p) > 0.01), st.integers(0, 60)
        ),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 1000),
)
def test_no_sample_repeats_before_its_domain_is_used_up(phases: list[Any], seed: int) -> None:
    mixture = manager(seed)
    drawn: list[list[int]] = [[], [], []]
    for index, (weights, count) in enumerate(phases):
        share = np.array(weights) / sum(weights)
        plan = mixture.draw(share, count, index)
        assert np.abs(np.array(counts(plan)) - share * count).max() < 1
        if index == 0:
            assert counts(plan) == largest_remainder(share, count).tolist()
        for d in range(3):
            drawn[d] += sorted(i for i in plan.sample_ids.tolist() if DOMAINS[i] == d)
    for d, size in enumerate((5, 30, 15)):
        times = np.bincount(drawn[d], minlength=50)[d == DOMAINS] if drawn[d] else np.zeros(size)
        assert times.max() - times.min() <= 1


def test_draw_probabilities_are_proportion_over_domain_size() -> None:
    plan = manager().draw(np.array([0.5, 0.3, 0.2]), 20, 0)
    want = (np.array([0.5, 0.3, 0.2]) / [5, 30, 15])[DOMAINS[plan.sample_ids]]
    np.testing.assert_allclose(plan.probabilities, want)


def test_a_mixture_survives_a_resume() -> None:
    mixture, fresh = manager(), manager()
    share = np.array([0.2, 0.5, 0.3])
    mixture.draw(share, 17, 0)
    fresh.load_state_dict(mixture.state_dict())
    assert np.array_equal(mixture.draw(share, 23, 1).sample_ids, fresh.draw(share, 23, 1).sample_ids)
    assert np.array_equal(mixture.proportions, fresh.proportions)
