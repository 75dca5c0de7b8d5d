"""Permutations at positions: bijective, fair, the same in pieces; a draw costs what it draws, not what the pool is."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.train.mixer.mixture import MixtureManager, rounded_counts
from dataflex.train.mixer.permutation import domain_stream, permuted
from dataflex.utils.errors import UserError


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_every_key_and_size_gives_a_permutation(size: int, key: int) -> None:
    found = permuted(np.arange(size), np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert np.array_equal(np.sort(found), np.arange(size))


@pytest.mark.parametrize("size", [2**31 - 1, 2**40, 2**52 + 1])
def test_positions_of_huge_domains_stay_inside_and_apart(size: int) -> None:
    places = np.unique(np.concatenate([np.arange(2000), size - 1 - np.arange(2000)]))
    found = permuted(places, np.full(len(places), size), np.full(len(places), 7, dtype=np.uint64))
    assert found.min() >= 0 and found.max() < size and len(np.unique(found)) == len(places)


def test_all_orders_of_four_are_about_as_frequent() -> None:
    """Chi-square with 23 degrees of freedom over 4,800 seeds; a fair one passes 57 once in 10,000 times."""
    orders = Counter(tuple(domain_stream(np.zeros(4, int), np.arange(4), np.array([4]), seed)) for seed in range(4800))
    assert len(orders) == 24
    assert sum((n - 200) ** 2 / 200 for n in orders.values()) < 57


def test_places_are_uniform_and_neighbours_unrelated() -> None:
    found = domain_stream(np.zeros(5000, int), np.arange(5000), np.array([100_000]), 3)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.06
    counts = np.histogram(found, bins=20, range=(0, 100_000))[0]
    assert ((counts - 250) ** 2 / 250).sum() < 51  # 19 degrees of freedom, one in 10,000


def test_seeds_domains_and_epochs_have_orders_of_their_own() -> None:
    sizes, zeros, places = np.array([50, 50]), np.zeros(50, int), np.arange(50)
    first = domain_stream(zeros, places, sizes, 1)
    others = [
        domain_stream(zeros, places, sizes, 2),
        domain_stream(zeros + 1, places, sizes, 1),
        domain_stream(zeros, places + 50, sizes, 1),
    ]
    assert all(not np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("names", [3, 4])
def test_ranges_and_lists_of_members_draw_from_the_right_domains(names: int) -> None:
    """Domains in one piece each, out of order, one of them empty; and the same samples interleaved."""
    blocks = np.repeat([2, 0, 1], [5, 7, 11])
    mixed = np.random.default_rng(0).permutation(blocks)
    for domain_ids in (blocks, mixed):
        share = np.array([0.4, 0.3, 0.3, 0.0])[:names]
        manager = MixtureManager(domain_ids, [f"d{i}" for i in range(names)], share, 5)
        ids = np.concatenate([manager.draw(share, 10, phase).sample_ids for phase in range(9)])
        assert np.bincount(domain_ids[ids], minlength=names).tolist() == [36, 27, 27, 0][:names]
        times = np.bincount(ids, minlength=23)
        assert all(np.ptp(times[domain_ids == d]) <= 1 for d in range(3))


def test_a_share_of_an_empty_domain_is_refused() -> None:
    manager = MixtureManager(np.zeros(3, dtype=int), ["full", "empty"], np.array([0.5, 0.5]), 0)
    with pytest.raises(UserError, match="domain 'empty' has no samples, its proportion is 0.5"):
        manager.draw(manager.proportions, 4, 0)


def test_a_small_share_gets_its_samples_over_the_phases() -> None:
    """40 domains, 4 samples a phase: without what is owed the same four domains would always be drawn."""
    share, owed, given_ = np.full(40, 1 / 40), np.zeros(40), np.zeros(40)
    for _ in range(30):
        counts, owed = rounded_counts(share, 4, owed)
        assert counts.sum() == 4 and counts.max() <= 1
        given_ += counts
    assert given_.tolist() == [3.0] * 40


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_counts_are_always_rounded_proportions(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 12))
    owed = np.zeros(k)
    for _ in range(6):
        raw = np.array(data.draw(st.lists(st.floats(0, 1), min_size=k, max_size=k).filter(lambda p: sum(p) > 0.01)))
        share, count = raw / raw.sum(), data.draw(st.integers(0, 50))
        counts, owed = rounded_counts(share, count, owed)
        assert counts.sum() == count and (counts >= 0).all()
        assert np.abs(counts - share * count).max() < 1 + 1e-6
        assert not counts[share == 0].any()


def test_a_draw_from_ten_million_samples_costs_what_it_draws() -> None:
    """100 domains, 4,096 samples. Generous: a permutation of one domain alone would take longer, and 0.8 MB."""
    domain_ids = np.repeat(np.arange(100, dtype=np.int32), 100_000)
    manager = MixtureManager(domain_ids, [str(d) for d in range(100)], np.full(100, 0.01), 1)
    manager.draw(manager.proportions, 4096, 0)
    seconds = []
    for phase in range(1, 6):
        started = time.perf_counter()
        manager.draw(manager.proportions, 4096, phase)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.03
    tracemalloc.start()
    manager.draw(manager.proportions, 4096, 6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_500_000
