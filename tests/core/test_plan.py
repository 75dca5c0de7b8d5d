"""Streams, splits into ranks, rounding, and the checks of what components return."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.core.plan import (
    Plan,
    check_proportions,
    check_sample_ids,
    epoch_stream,
    generator,
    largest_remainder,
    rank_slices,
    steps_of_epochs,
)
from dataflex.utils.errors import UserError

small = settings(max_examples=60, deadline=None)


@small
@given(size=st.integers(1, 40), epochs=st.integers(1, 4), seed=st.integers(0, 2**40))
def test_every_sample_comes_once_before_any_comes_twice(size: int, epochs: int, seed: int) -> None:
    stream = epoch_stream(size, seed, "test", 0, size * epochs)
    for epoch in stream.reshape(epochs, size):
        assert sorted(epoch) == list(range(size))


@small
@given(size=st.integers(1, 30), start=st.integers(0, 80), cut=st.integers(0, 50), rest=st.integers(0, 50))
def test_a_stream_may_be_read_in_pieces(size: int, start: int, cut: int, rest: int) -> None:
    whole = epoch_stream(size, 5, "test", start, cut + rest)
    pieces = epoch_stream(size, 5, "test", start, cut), epoch_stream(size, 5, "test", start + cut, rest)
    assert whole.dtype == np.int64
    assert np.array_equal(whole, np.concatenate(pieces))


def test_epochs_seeds_and_purposes_are_ordered_differently() -> None:
    first, second = epoch_stream(50, 1, "test", 0, 100).reshape(2, 50)
    others = [epoch_stream(50, 2, "test", 0, 50), epoch_stream(50, 1, "other", 0, 50), second]
    assert not any(np.array_equal(first, other) for other in others)


def test_generators_are_reproducible_and_independent() -> None:
    def draws(*key: Any) -> list[float]:
        return generator(*key).random(2000).tolist()

    assert draws(1, "order", 3) == draws(1, "order", 3)
    keys = [
        (1, "order", 3),
        (1, "order", 4),
        (2, "order", 3),
        (1, "picks", 3),
        (1, "order", "3"),
        (1, "order"),
        (13, "order"),
    ]
    table = np.array([draws(*key) for key in keys])
    off_diagonal = np.corrcoef(table) - np.eye(len(keys))
    assert np.abs(off_diagonal).max() < 0.12
    assert draws(np.int64(1), "order", 3) == draws(1, "order", 3)


def test_a_generator_does_not_touch_the_global_state() -> None:
    before = np.random.get_state()[1].copy()
    generator(1, "order").random(10)
    assert np.array_equal(before, np.random.get_state()[1])


SPLITS = [(m, g, w) for w in (1, 2, 3, 4, 6) for m in (1, 2, 3, 4, 6, 12) for g in (1, 2, 4) if m * g * w == 24]


@pytest.mark.parametrize(("micro", "accumulation", "world"), SPLITS)
def test_the_ranks_together_train_on_the_global_batch(micro: int, accumulation: int, world: int) -> None:
    ids = generator(1, "ids").permutation(24).astype(np.int64)
    ranks = [rank_slices(ids, micro_batch=micro, rank=r, world_size=world) for r in range(world)]
    assert all(len(parts) == accumulation and all(len(p) == micro for p in parts) for parts in ranks)
    for k in range(accumulation):
        together = np.concatenate([parts[k] for parts in ranks])
        assert np.array_equal(together, ids[k * micro * world : (k + 1) * micro * world])


def test_splits_of_one_global_micro_batch_agree() -> None:
    """4 x 1, 2 x 2 and 1 x 4 (micro-batch x ranks): the same samples meet in every micro-step."""
    ids = np.arange(16)
    for k in range(4):
        met = {
            tuple(i for r in range(world) for i in rank_slices(ids, micro_batch=micro, rank=r, world_size=world)[k])
            for micro, world in ((4, 1), (2, 2), (1, 4))
        }
        assert len(met) == 1


def test_a_plan_gives_its_global_batches_in_order() -> None:
    plan = Plan(np.arange(12), np.linspace(0, 1, 12))
    ids, probabilities = plan.step(2, 4)
    assert ids.tolist() == [8, 9, 10, 11]
    assert np.array_equal(probabilities, np.linspace(0, 1, 12)[8:])
    with pytest.raises(AssertionError, match="shorter than its phase"):
        plan.step(3, 4)
    with pytest.raises(AssertionError, match="shorter than its phase"):
        plan.step(2, 5)  # of which two are there


def test_a_plan_refuses_what_is_not_ids() -> None:
    for ids, probabilities in (
        (np.arange(3.0), np.ones(3)),
        (np.arange(3), np.ones(2)),
        (np.zeros((2, 2), dtype=np.int64), np.ones((2, 2))),
    ):
        with pytest.raises(AssertionError):
            Plan(ids, probabilities)


@pytest.mark.parametrize(
    ("epochs", "pool", "batch", "steps"),
    [
        (1.0, 16, 8, 2),
        (1.0, 17, 8, 3),
        (2.0, 50, 6, 18),
        (3.0, 10, 4, 9),
        (1.5, 50, 6, 14),
        (0.5, 16, 8, 1),
        (0.01, 16, 8, 1),
        (1.0, 3, 8, 1),
        (3.0, 3, 8, 3),
        (0.1, 30, 1, 3),
        (1.1, 100, 2, 56),  # 1.1 * 50 is more than 55 in floating point, for transformers too
        (1.0, 0, 8, 1),
    ],
)
def test_steps_of_epochs(epochs: float, pool: int, batch: int, steps: int) -> None:
    assert steps_of_epochs(epochs, pool, batch) == steps


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=20).filter(lambda w: sum(w) > 1e-6),
    total=st.integers(0, 100_000),
)
def test_rounding_sums_up_and_stays_within_one(weights: list[float], total: int) -> None:
    proportions = np.array(weights)
    counts = largest_remainder(proportions, total)
    exact = proportions / proportions.sum() * total
    assert counts.dtype == np.int64 and counts.sum() == total and (counts >= 0).all()
    assert np.abs(counts - exact).max() < 1 + 1e-6
    assert (counts[proportions == 0] == 0).all()


def test_rounding_by_hand() -> None:
    assert largest_remainder(np.array([0.5, 0.3, 0.2]), 7).tolist() == [4, 2, 1]
    assert largest_remainder(np.array([1.0, 1.0, 1.0]), 4).tolist() == [2, 1, 1]
    assert largest_remainder(np.array([0.0, 1.0]), 5).tolist() == [0, 5]


def checked(ids: Any, *, pool_size: int = 10, asked: int = 3, replacement: bool = False) -> list[int]:
    return check_sample_ids(
        ids, pool_size=pool_size, asked=asked, replacement=replacement, source="selector 'mine' at step 4"
    ).tolist()


@pytest.mark.parametrize("ids", [[7, 0, 9], np.array([7, 0, 9], dtype=np.int32), (7, 0, 9), np.array([7.0, 0.0, 9.0])])
def test_good_ids_pass(ids: Any) -> None:
    assert checked(ids) == [7, 0, 9]


def test_ids_may_be_a_tensor() -> None:
    import torch

    assert checked(torch.tensor([7, 0, 9])) == [7, 0, 9]


def test_repeats_pass_with_replacement() -> None:
    assert checked([7, 7, 9], replacement=True) == [7, 7, 9]


FLAT = "selector 'mine' at step 4: must return a flat list of sample ids (int), got "


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([1, 2], "selector 'mine' at step 4: asked for 3 sample ids, got 2"),
        ([], "selector 'mine' at step 4: asked for 3 sample ids, got 0"),
        ([1, 10, 2], "selector 'mine' at step 4: sample id 10 at position 1 is out of range; valid: 0 to 9"),
        ([1, 2, -1], "selector 'mine' at step 4: sample id -1 at position 2 is out of range; valid: 0 to 9"),
        (
            [4, 1, 4],
            "selector 'mine' at step 4: sample id 4 is returned 2 times; set `replacement = True` on the "
            "selector if that is meant",
        ),
        ([1.5, 2, 3], FLAT + "float64 (3,)"),
        ([[1, 2, 3]], FLAT + "int64 (1, 3)"),
        ([float("nan"), 2, 3], FLAT + "float64 (3,)"),
        ([float("inf"), 2, 3], FLAT + "float64 (3,)"),
        (["a", "b", "c"], FLAT + "list"),
        (["1", "2", "3"], FLAT + "list"),
        ([True, False, True], FLAT + "bool (3,)"),
        ([[1], [2, 3]], FLAT + "list"),
        (None, FLAT + "NoneType"),
        ({1, 2, 3}, FLAT + "set"),
    ],
)
def test_bad_ids_are_refused(ids: Any, text: str) -> None:
    with pytest.raises(UserError) as failure:
        checked(ids)
    assert str(failure.value) == text


def proportions(values: Any) -> list[float]:
    return check_proportions(values, names=["maths", "dates"], source="mixer 'mine' at step 4").tolist()


@pytest.mark.parametrize(("values", "want"), [([1, 3], [0.25, 0.75]), (np.array([0.0, 2.0]), [0.0, 1.0])])
def test_good_proportions_are_normalised(values: Any, want: list[float]) -> None:
    assert proportions(values) == want


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.7, -0.3], "mixer 'mine' at step 4: proportion of 'dates' is -0.3; valid: finite and >= 0"),
        ([float("nan"), 1], "mixer 'mine' at step 4: proportion of 'maths' is nan; valid: finite and >= 0"),
        ([1, float("inf")], "mixer 'mine' at step 4: proportion of 'dates' is inf; valid: finite and >= 0"),
        ([0, 0], "mixer 'mine' at step 4: proportions are all zero"),
        ([1, 1, 1], "mixer 'mine' at step 4: needs 2 proportions (maths, dates), got shape (3,)"),
        (0.5, "mixer 'mine' at step 4: needs 2 proportions (maths, dates), got shape ()"),
        (None, "mixer 'mine' at step 4: needs 2 proportions (maths, dates), got shape ()"),
        (["x", 1], "mixer 'mine' at step 4: must return a flat list of numbers, got ['x', 1]"),
        ([[1], [1, 2]], "mixer 'mine' at step 4: must return a flat list of numbers, got [[1], [1, 2]]"),
        ({"a": 1}, "mixer 'mine' at step 4: must return a flat list of numbers, got {'a': 1}"),
    ],
)
def test_bad_proportions_are_refused(values: Any, text: str) -> None:
    with pytest.raises(UserError) as failure:
        proportions(values)
    assert str(failure.value) == text
