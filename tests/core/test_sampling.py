"""Weighted draws: proportions, distinctness, inclusion probabilities, large pools, and the 1 / q correction."""

from __future__ import annotations

import numpy as np
import pytest

from dataflex.core import sampling
from dataflex.core.plan import Phase, Schedule, generator
from dataflex.core.sampling import distinct_draw, weighted_draw
from dataflex.core.weights import StaticWeights
from dataflex.train.trainer.sample_trainer import WeightedPlanner
from dataflex.utils.errors import UserError
from tests.train.test_planners import make_run

WEIGHTS = np.array([1.0, 0.0, 2.0, 5.0, 0.5, 3.0])


def test_a_pool_beyond_two_to_the_24_is_drawn_from() -> None:
    weights = np.ones((1 << 24) + 1000)
    weights[:-1000] = 0.0
    ids = weighted_draw(weights, 500, replacement=True, draw=generator(0, "test"))
    assert ids.min() >= 1 << 24 and len(np.unique(ids)) > 300
    ids, included = distinct_draw(weights, 600, generator(0, "test"))
    assert ids.min() >= 1 << 24 and len(np.unique(ids)) == 600
    assert abs(included.mean() - 0.6) < 0.05


def test_draws_in_chunks_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = generator(1, "weights").random(999)
    whole = distinct_draw(weights, 100, generator(1, "draw"))
    monkeypatch.setattr(sampling, "_CHUNK", 64)
    for a, b in zip(whole, distinct_draw(weights, 100, generator(1, "draw")), strict=True):
        assert np.array_equal(a, b)


def test_everything_is_included_for_sure_where_all_is_drawn() -> None:
    ids, included = distinct_draw(WEIGHTS, 5, generator(2, "draw"))
    assert sorted(ids) == [0, 2, 3, 4, 5] and (included == 1).all()
    with pytest.raises(UserError, match="asked for 6 samples, but only 5 can be drawn"):
        distinct_draw(WEIGHTS, 6, generator(2, "draw"))


def planned(seed: int, replacement: bool, weights: np.ndarray = WEIGHTS, steps: int = 1) -> tuple[np.ndarray, ...]:
    """Sample ids and probabilities of the first phase of 4 x steps samples."""
    run = make_run(Schedule((Phase(0, 0, steps, 0, False),)))
    run.seed = seed
    plan = WeightedPlanner(weights / weights.sum(), replacement).plan(run, run.schedule.phases[0])
    return plan.sample_ids, plan.probabilities


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("name", ["probability", "both", "preset"])
def test_the_mean_gradient_is_the_asked_one(name: str, replacement: bool) -> None:
    """Weighting by w, and sampling by w with 1 / q, have the same mean: the null hypothesis of a chi-squared test.

    g: a gradient of 3 numbers per sample. The mean of 4,000 plans has a known covariance (estimated from them), so
    n d' C^-1 d is Hotelling's T^2, here chi-squared with 3 degrees of freedom: above 21.1 with chance 1e-4. That is
    the false-alarm rate of each of the six cases if their seeds were drawn anew.
    """
    gradients = generator(7, "gradients").normal(size=(len(WEIGHTS), 3))
    w = np.ones(len(WEIGHTS)) if name == "preset" else WEIGHTS
    q = np.array([3.0, 1.0, 1.0, 2.0, 0.5, 1.0]) if name == "preset" else WEIGHTS
    static = StaticWeights(loss=None if name == "probability" else w, corrected=name != "probability")
    want = (w[:, None] * gradients).sum(0) / (w.sum() if name == "probability" else len(w))
    means = []
    for seed in range(4000):
        ids, probabilities = planned(seed, replacement, q)
        of = static.of(ids, probabilities, len(w))
        means.append(((1.0 if of is None else of[:, None]) * gradients[ids]).mean(0))
    off = np.mean(means, axis=0) - want
    statistic = len(means) * off @ np.linalg.solve(np.cov(np.array(means).T), off)
    if name == "probability" and not replacement:
        assert statistic > 21.1, "distinct draws without a correction are known to be biased"
    else:
        assert statistic < 21.1


def test_a_plan_is_a_function_of_seed_and_phase() -> None:
    for replacement in (True, False):
        ids, _ = planned(3, replacement)
        assert np.array_equal(ids, planned(3, replacement)[0])
        assert any(not np.array_equal(ids, planned(seed, replacement)[0]) for seed in (4, 5, 6))


@pytest.mark.parametrize("replacement", [True, False])
def test_every_pass_has_a_draw_of_its_own(replacement: bool) -> None:
    run = make_run(Schedule((Phase(0, 0, 1, 0, False), Phase(1, 1, 1, 0, False), Phase(2, 2, 1, 0, False))))
    planner = WeightedPlanner(WEIGHTS / WEIGHTS.sum(), replacement)
    drawn = {tuple(planner.plan(run, phase).sample_ids.tolist()) for phase in run.schedule.phases}
    assert len(drawn) == 3


def test_a_pass_of_more_samples_than_there_are_is_refused() -> None:
    run = make_run(Schedule((Phase(0, 0, 2, 0, False),)))
    WeightedPlanner(WEIGHTS / WEIGHTS.sum(), True).on_train_start(run)
    text = "sampling_replacement: false: a pass draws 8 distinct samples .*, the pool has 5 with a weight > 0"
    with pytest.raises(UserError, match=text):
        WeightedPlanner(WEIGHTS / WEIGHTS.sum(), False).on_train_start(run)
    one, two = (WeightedPlanner(np.array(p), True).identity for p in ([0.5, 0.5], [0.4, 0.6]))
    assert one != two
