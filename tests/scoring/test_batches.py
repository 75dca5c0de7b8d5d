"""Which samples are scored together, and that every rank makes the same number of calls."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.scoring.batches import bucket, deal


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    budget=st.integers(1, 200),
    most=st.integers(1, 9),
)
def test_batches_hold_every_sample_once_within_budget(lengths: list[int], budget: int, most: int) -> None:
    ids = np.arange(100, 100 + len(lengths), dtype=np.int64)
    batches = bucket(ids, np.array(lengths), budget, most)
    assert sorted(np.concatenate(batches)) == ids.tolist()
    longest = [max(lengths[i - 100] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, tokens in zip(batches, longest, strict=True):
        assert len(batch) <= most
        assert len(batch) * tokens <= max(budget, max(lengths))


def test_a_sample_above_the_budget_lets_the_others_be_as_many_tokens() -> None:
    """A batch of 100 tokens has to be, so that a budget of 30 makes no batch of one out of what is shorter."""
    lengths = np.array([40, 100, 25, 25, 50, 25, 50, 24])
    batches = bucket(np.arange(8), lengths, 30)
    assert [batch.tolist() for batch in batches] == [[1], [4, 6], [0, 2], [3, 5, 7]]
    assert [len(batch) for batch in bucket(np.arange(8), lengths, 200)] == [2, 4, 2]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_ranks_make_the_same_number_of_calls_and_keep_each_batch_once(count: int, world_size: int) -> None:
    batches = [np.array([i]) for i in range(count)]
    dealt = [list(deal(batches, rank, world_size)) for rank in range(world_size)]
    assert len({len(calls) for calls in dealt}) == 1
    kept = [int(batch[0]) for calls in dealt for batch, counts in calls if counts]
    assert sorted(kept) == list(range(count))
