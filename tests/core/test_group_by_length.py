"""group_by_length: batches of like lengths, in an order that a seed fixes, with nothing lost."""

from __future__ import annotations

import numpy as np
import pytest

from dataflex.core.plan import GROUPED_BATCHES, Plan, group_by_length

BATCH = 4


def _plan(batches: int, seed: int = 0) -> tuple[Plan, np.ndarray]:
    draw = np.random.default_rng(seed)
    ids = draw.permutation(batches * BATCH).astype(np.int64)
    lengths = draw.integers(1, 1000, len(ids)).astype(np.int32)
    return Plan(ids, ids / len(ids)), lengths


def _spread(ids: np.ndarray, lengths: np.ndarray) -> float:
    return float(np.ptp(lengths[ids].reshape(-1, BATCH), axis=1).mean())


@pytest.mark.parametrize("batches", [0, 1, 7, GROUPED_BATCHES, 2 * GROUPED_BATCHES + 3])
def test_every_draw_stays_with_its_probability_in_its_run_of_batches(batches: int) -> None:
    plan, lengths = _plan(batches)
    grouped = group_by_length(plan, lengths, BATCH, seed=1, phase=0)
    width = GROUPED_BATCHES * BATCH
    for start in range(0, batches * BATCH, width):
        window = slice(start, start + width)
        assert sorted(grouped.sample_ids[window]) == sorted(plan.sample_ids[window])
    assert np.array_equal(grouped.probabilities, grouped.sample_ids / max(1, len(plan.sample_ids)))


def test_batches_hold_like_lengths_in_a_shuffled_order() -> None:
    plan, lengths = _plan(GROUPED_BATCHES)
    grouped = group_by_length(plan, lengths, BATCH, seed=1, phase=0)
    assert _spread(grouped.sample_ids, lengths) < 0.1 * _spread(plan.sample_ids, lengths)
    means = lengths[grouped.sample_ids].reshape(-1, BATCH).mean(axis=1)
    assert not np.array_equal(means, np.sort(means)) and not np.array_equal(means, np.sort(means)[::-1])


def test_seed_and_phase_fix_the_order() -> None:
    plan, lengths = _plan(GROUPED_BATCHES)
    orders = [
        group_by_length(plan, lengths, BATCH, seed=s, phase=p).sample_ids for s, p in ((1, 0), (1, 0), (2, 0), (1, 1))
    ]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], orders[3])
