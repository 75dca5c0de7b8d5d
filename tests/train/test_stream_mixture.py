"""Plans over streams: counts by the proportions, each domain in the order of its stream, from any phase on."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.config.schema import FlexSection
from dataflex.engine.models.reference import open_reference
from dataflex.train.mixer.mixture import Mixture, MixtureManager, StreamMixture, rounded_counts
from dataflex.train.mixer.odm_mixer import OdmMixer
from dataflex.train.mixer.static_mixer import StratifiedMixer
from dataflex.train.trainer.build import STREAM_PLAN, make_schedule
from dataflex.train.trainer.mix_trainer import MixPlanner, mix_planner
from dataflex.utils.errors import UserError
from tests.train.test_planners import make_run, plans

SIZES = np.array([5, 0, 0])


def mixture(k: int, seed: int = 3, sizes: Callable[[], Any] = lambda: SIZES) -> StreamMixture:
    return StreamMixture([f"d{i}" for i in range(k)], np.full(k, 1 / k), seed, sizes)


SHARES = st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda shares: sum(shares) > 0.01)


@given(shares=SHARES, phases=st.lists(st.integers(1, 60), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_counts_are_the_rounded_proportions_and_positions_ascend(
    shares: list[float], phases: list[int], seed: int
) -> None:
    k, proportions = len(shares), np.array(shares) / sum(shares)
    manager, owed = mixture(k, seed), np.zeros(k)
    seen: list[list[int]] = [[] for _ in range(k)]
    for phase, count in enumerate(phases):
        plan = manager.draw(proportions, count, phase)
        want, owed = rounded_counts(proportions, count, owed)
        domains = plan.sample_ids % k
        assert np.bincount(domains, minlength=k).tolist() == want.tolist()
        assert (np.abs(want - proportions * count) < 1 + 1e-6).all()
        np.testing.assert_array_equal(plan.probabilities, proportions[domains])
        for d in range(k):
            seen[d] += (plan.sample_ids[domains == d] // k).tolist()
    assert seen == [list(range(len(one))) for one in seen], "every position once, in order"


def test_domains_come_in_a_shuffled_order_that_depends_on_the_phase() -> None:
    manager = mixture(3)
    orders = [(manager.draw(np.full(3, 1 / 3), 60, phase).sample_ids % 3).tolist() for phase in range(2)]
    assert orders[0] != orders[1]
    assert all(np.count_nonzero(np.diff(order)) > 20 for order in orders)
    assert (mixture(3).draw(np.full(3, 1 / 3), 60, 0).sample_ids % 3).tolist() == orders[0]


def test_a_restored_mixture_goes_on() -> None:
    one, two = mixture(3), mixture(3)
    shares = np.array([0.5, 0.3, 0.2])
    one.draw(shares, 7, 0)
    two.load_state_dict(one.state_dict())
    np.testing.assert_array_equal(one.draw(shares, 9, 1).sample_ids, two.draw(shares, 9, 1).sample_ids)


def test_passes_count_where_a_size_is_known_and_sizes_are_not_to_be_had() -> None:
    manager = mixture(3)
    manager.draw(np.full(3, 1 / 3), 30, 0)
    assert manager.epochs.tolist() == [2.0, 0.0, 0.0]
    with pytest.raises(UserError, match="streaming: proportions by size need the domains' sizes"):
        StratifiedMixer(manager).mix(None, 0)


def test_stored_token_losses_are_of_known_samples(tmp_path: Any) -> None:
    pool = SimpleNamespace(size=None)
    with pytest.raises(UserError, match="is no model, and stored token losses are of known samples"):
        open_reference(str(tmp_path), engine=None, pool=pool, model=None, open_head=None)  # type: ignore[arg-type]


def test_the_planner_warns_of_repeats_and_says_fixed_proportions_once(capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    planner = MixPlanner(mixture(3), None, "static", None, most_epochs=2.0)
    made = plans(planner, run)
    assert [len(plan.sample_ids) for plan in made] == [8, 12, 12, 12]
    said = capsys.readouterr().err
    assert said.count("static mixes d0 33.3%, d1 33.3%, d2 33.3%") == 1
    assert said.count("is gone over more than 2 times") == 1 and "domain 'd0' is gone over" in said


def test_a_learning_mixer_draws_from_streams_as_from_a_pool() -> None:
    """What is learned and decided does not know where samples come from: the counts are those of the pool."""
    pool = make_run().pool
    managers: list[Mixture] = [mixture(3), MixtureManager(pool.domain_ids, ["d0", "d1", "d2"], np.full(3, 1 / 3), 3)]
    counts = []
    for manager in managers:
        planner = mix_planner(manager, OdmMixer(manager), "odm", None, 100.0)
        for _ in range(40):
            planner.mixer.learn(np.array([9.0, 1.0, 1.0]), np.ones(3))  # type: ignore[union-attr]
        made = [plan.sample_ids for plan in plans(planner, make_run())]
        domains = [ids % 3 if manager is managers[0] else pool.domain_ids[ids] for ids in made]
        counts.append([np.bincount(one, minlength=3).tolist() for one in domains])
    assert counts[0] == counts[1] and counts[0][-1][0] > 4


@pytest.mark.parametrize("flex", [{}, {"train_type": "dynamic_mix", "static_mix": True}])
def test_the_schedule_needs_no_pool(flex: dict[str, Any]) -> None:
    """Plans of undecided phases stay small, however long the run."""
    schedule = make_schedule(FlexSection(**flex), pool_size=None, global_batch=48, epochs=3.0, fixed=4000)
    steps = [phase.steps for phase in schedule.phases]
    assert sum(steps) == 4000 and max(steps) == STREAM_PLAN // 48
    huge = make_schedule(FlexSection(**flex), pool_size=None, global_batch=10**6, epochs=3.0, fixed=3)
    assert [phase.steps for phase in huge.phases] == [1, 1, 1]
