"""Samples into rows: counts by hand and by LLaMA-Factory, and phases that are filled exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.core.packing import BUFFER, Packing, drawn, pack
from dataflex.core.plan import Plan, generator


def rows_of(order: Any, starts: Any) -> list[list[int]]:
    return [order[first:end].tolist() for first, end in zip(starts, starts[1:], strict=False)]


def test_a_row_takes_the_longest_that_fits_and_keeps_the_order() -> None:
    # Into 10: 7 and 3; 6 and 4; 5 and 2. Of the two threes the first is taken.
    lengths = np.array([3, 5, 6, 3, 7, 4, 2])
    assert rows_of(*pack(lengths, 10)) == [[0, 4], [1, 3, 6], [2, 5]]


def test_next_fit_changes_no_order() -> None:
    lengths = np.array([3, 5, 6, 3, 7, 4, 2])
    assert rows_of(*pack(lengths, 10, buffer=1)) == [[0, 1], [2, 3], [4], [5, 6]]


def test_a_row_is_filled_from_one_buffer_only() -> None:
    lengths = np.full(BUFFER + 3, 4)
    order, starts = pack(lengths, 12)
    rows = rows_of(order, starts)
    assert [len(row) for row in rows[-3:]] == [3, 1, 3], "334 rows of the first thousand, one of the rest"
    assert len(rows) == 335
    assert rows_of(*pack(np.array([2, 2, 2, 2]), 8, buffer=2)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("buffer", [1, BUFFER])
def test_no_samples_have_no_rows(buffer: int) -> None:
    order, starts = pack(np.array([], dtype=np.int64), 8, buffer)
    assert (order.tolist(), starts.tolist()) == ([], [0])


LENGTHS = {
    "lognormal": lambda draw: np.clip(draw.lognormal(5.5, 0.9, 2500), 1, 4096).astype(int),
    "uniform": lambda draw: draw.integers(400, 2500, 2500),
    "two kinds": lambda draw: np.repeat([1700, 1300], 1250) + draw.integers(-50, 50, 2500),
}


@pytest.mark.parametrize(("kind", "count"), [("lognormal", 227), ("uniform", 891), ("two kinds", 1042)])
def test_as_many_rows_as_llamafactory_makes(kind: str, count: int) -> None:
    """count: of LLaMA-Factory 0.9.5 for the same lengths, a thousand at a time as its preprocessing_batch_size says."""
    packing = Packing(LENGTHS[kind](np.random.default_rng(5)), 4096)
    assert packing.pool.rows == count
    tokens = packing.lengths.sum()
    assert packing.fill(packing.pool) == pytest.approx(tokens / (count * 4096))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60),
    capacity=st.integers(20, 40),
    buffer=st.integers(1, 30),
)
def test_every_sample_has_one_place_and_no_row_is_too_long(lengths: list[int], capacity: int, buffer: int) -> None:
    order, starts = pack(np.array(lengths), capacity, buffer)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    rows = rows_of(order, starts)
    assert all(row and sum(lengths[i] for i in row) <= capacity for row in rows)
    if buffer == 1:
        assert order.tolist() == list(range(len(lengths)))


def plan_of(*rows: list[int]) -> Plan:
    ids = np.array([i for row in rows for i in row], dtype=np.int64)
    return Plan(ids, ids / 100, np.cumsum([0, *map(len, rows)]))


def test_the_steps_of_a_plan_hold_whole_rows() -> None:
    plan = plan_of([3, 1], [4], [0, 2, 5], [6])
    assert plan.rows == 4
    assert [plan.step(i, 2)[0].tolist() for i in range(2)] == [[3, 1, 4], [0, 2, 5, 6]]
    assert plan.part(1, 3)[0].tolist() == [4, 0, 2, 5]
    assert plan.part(1, 3)[1].tolist() == [0.04, 0.0, 0.02, 0.05]
    with pytest.raises(AssertionError, match="shorter than its phase"):
        plan.step(2, 2)


def test_rows_are_taken_in_any_order_and_again() -> None:
    taken = plan_of([3, 1], [4], [0, 2, 5]).take(np.array([2, 0, 2]))
    assert taken.sample_ids.tolist() == [0, 2, 5, 3, 1, 0, 2, 5]
    assert taken.starts is not None and taken.starts.tolist() == [0, 3, 5, 8]
    assert taken.probabilities.tolist() == (taken.sample_ids / 100).tolist()
    alone = Plan(np.array([7, 8, 9]), np.ones(3)).take(np.array([1, 1]))
    assert alone.sample_ids.tolist() == [8, 8] and alone.starts is None


class Draws:
    """Draws of the first samples of a shuffled pool; how many were asked for."""

    def __init__(self, size: int) -> None:
        self.order, self.asked = generator(1, "draws").permutation(size), list[int]()

    def __call__(self, count: int) -> Plan:
        self.asked.append(count)
        return Plan(np.resize(self.order, count), np.full(count, 0.5))


@pytest.mark.parametrize("rows", [1, 2, 7, 30])
def test_a_phase_is_filled_exactly(rows: int) -> None:
    packing = Packing(np.random.default_rng(0).integers(4, 40, 500), 64)
    draw = Draws(500)
    plan = packing.filled(draw, rows)
    assert plan.rows == rows and plan.starts is not None and (np.diff(plan.starts) > 0).all()
    assert sorted(plan.sample_ids) == sorted(draw.order[: len(plan.sample_ids)]), "all that was drawn is in the rows"
    assert packing.fill(plan) > 0.9
    sums = np.add.reduceat(packing.lengths[plan.sample_ids], plan.starts[:-1])
    assert sums.max() <= 64
    room = 40 if rows < 30 else 4  # that the next sample, or most of them, may need
    assert packing.fill(plan) * rows * 64 >= 0.995 * packing.fill(packing.pool) * rows * 64 - room
    again = packing.filled(Draws(500), rows)
    assert np.array_equal(plan.sample_ids, again.sample_ids) and np.array_equal(plan.starts, again.starts)


def test_where_samples_do_not_share_rows_each_has_its_own() -> None:
    packing = Packing(np.full(50, 33), 64)
    assert packing.pool.rows == 50
    assert packing.filled(Draws(50), 12).rows == len(packing.filled(Draws(50), 12).sample_ids) == 12


def test_too_few_samples_are_spread_over_the_rows() -> None:
    plan = Packing(np.full(50, 4), 64).filled(Draws(50), 6, most=10)
    assert plan.rows == 6 and sorted(plan.sample_ids) == sorted(Draws(50).order[:10])
    assert plan.starts is not None and (np.diff(plan.starts) > 0).all()


def test_rows_that_are_nine_tenths_full_are_asked_for_again() -> None:
    """Of the pool's 880 tokens 11 rows are full, so that 4 can hold 40 samples of 8; a mean sample says 37."""
    packing, draw = Packing(np.array([8] * 70 + [10] * 32), 80), Draws(40)
    draw.order = np.arange(40)
    assert packing.fill(packing.pool) == 1.0
    plan = packing.filled(draw, 4)
    assert draw.asked == [37, 40], "half a row more, and no more than as many of the shortest as fit"
    assert np.diff(plan.starts).tolist() == [10] * 4 and packing.fill(plan) == 1.0


def test_what_costs_much_is_asked_seldom() -> None:
    packing = Packing(np.random.default_rng(0).integers(4, 40, 3000), 64)
    draw = Draws(3000)
    plan = packing.filled(draw, 400, most=3000, asks=8, enough=0.98)
    assert len(draw.asked) <= 3 and packing.fill(plan) > 0.97
    short = Packing(np.where(np.arange(3000) % 2, 4, 60), 64)
    draw = Draws(3000)
    draw.order = np.arange(1, 3000, 2)  # far shorter than the pool is
    assert short.filled(draw, 40, most=1500, asks=8, enough=0.98).rows == 40
    assert len(draw.asked) <= 8


def test_without_packing_a_row_is_a_sample() -> None:
    draw = Draws(20)
    plan = drawn(None, draw, 7)
    assert plan.starts is None and plan.rows == 7 and draw.asked == [7]
