"""Near-duplicates over more candidates than are looked at in one block, against a loop over all pairs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.scoring.decide import choose as choosing
from dataflex.scoring.decide import columns
from dataflex.scoring.decide.choose import BLOCK
from dataflex.scoring.decide.table import ArrayTable
from tests.scoring.one_column import choose

ALIKE = 0.9


def families(count: int, kinds: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noisy copies of ``kinds`` random rows: fp16 rows [count, 64], whose copy each is, and scores."""
    draw = np.random.default_rng(seed)
    family = draw.integers(0, kinds, count)
    rows = draw.standard_normal((kinds, 64))[family] + 0.05 * draw.standard_normal((count, 64))
    return rows.astype(np.float16), family, draw.permutation(count).astype(np.float64)


def by_pairs(
    rows: np.ndarray, scores: np.ndarray, domains: np.ndarray, count: int, quotas: Any, alike: float = ALIKE
) -> list[int]:
    """One candidate after the other, compared with each that was taken before."""
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    left = [count] * (int(domains.max()) + 1) if quotas is None else list(quotas)
    picks: list[int] = []
    for place in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if len(picks) < count and left[domains[place]] and all(unit[place] @ unit[p] < alike for p in picks):
            picks.append(place)
            left[domains[place]] -= 1
    return picks


@pytest.mark.parametrize("count", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 7])
@pytest.mark.parametrize("wanted", [1, 30, 100, 2000])
def test_a_duplicate_in_a_later_block_is_passed_over(count: int, wanted: int) -> None:
    rows, family, scores = families(count, 60, count)
    domains = family % 3
    asked: list[int] = []
    picks = choose(scores, domains, wanted, None, lambda ids: (asked.append(len(ids)), rows[ids])[1], ALIKE)
    assert picks.tolist() == by_pairs(rows, scores, domains, wanted, None)
    assert len(picks) == min(wanted, 60) and len(set(family[picks])) == len(picks)
    assert max(asked) <= BLOCK and sum(asked) == (BLOCK if wanted < 60 and count > BLOCK else count)


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 60),
    kinds=st.integers(1, 40),
    block=st.sampled_from([1, 2, 5, 16]),
    wanted=st.integers(1, 60),
    quotas=st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)),
    seed=st.integers(0, 9),
)
def test_blocks_of_any_size_choose_the_same(
    count: int, kinds: int, block: int, wanted: int, quotas: tuple[int, int] | None, seed: int
) -> None:
    rows, family, scores = families(count, kinds, seed)
    domains = np.append(family[1:] % 2, 1)
    if quotas is not None:
        wanted = max(1, sum(quotas))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "BLOCK", block)
        got = choose(scores, domains, wanted, None if quotas is None else np.array(quotas), lambda i: rows[i], ALIKE)
    assert got.tolist() == by_pairs(rows, scores, domains, wanted, quotas)


def test_a_cosine_of_exactly_the_bound_is_alike_and_zeros_are_not() -> None:
    rows = np.array([[3, 4], [4, 3], [3, 4], [0, 0], [0, 0]], dtype=np.float16)
    scores, domains = np.arange(5.0)[::-1].copy(), np.zeros(5, dtype=np.int64)
    assert choose(scores, domains, 5, None, lambda i: rows[i], 0.97).tolist() == [0, 1, 3, 4]
    assert choose(scores, domains, 5, None, lambda i: rows[i], 0.5).tolist() == [0, 3, 4]
    one = np.array([[1, 0], [2, 0], [0, 1]], dtype=np.float16)
    assert choose(scores[:3], domains[:3], 3, None, lambda i: one[i], 1.0).tolist() == [0, 2]


@pytest.mark.parametrize("block", [1, 2, 5, 16])
def test_no_more_are_taken_than_wanted_wherever_a_block_ends(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, family, scores = families(60, 40, 0)
    domains = np.append(family[1:] % 2, 1)
    monkeypatch.setattr(choosing, "BLOCK", block)
    for wanted in (1, 2, 5, 6, 7, 16, 20, 24):
        got = choose(scores, domains, wanted, None, lambda i: rows[i], ALIKE)
        assert got.tolist() == by_pairs(rows, scores, domains, wanted, None) and len(got) == wanted


def in_turn(table: np.ndarray, rows: np.ndarray, count: int, rule: str, order: list[int]) -> list[tuple[int, int]]:
    """(sample, column) by a loop: who is alike to one that was taken is as good as gone."""
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    best, each = table.astype(np.float64), list(range(table.shape[1]))
    z = (best - best.mean(axis=0)) / best.std(axis=0)
    picks: list[tuple[int, int]] = []
    waiting: list[int] = []
    while len(picks) < count:
        taken = [i for i, _ in picks]
        free = [i for i in range(len(best)) if i not in taken and all(unit[i] @ unit[p] < ALIKE for p in taken)]
        if not free:
            break
        value = best
        if rule == "balanced":
            waiting, value = each, z - (z[taken].mean(axis=0) if taken else 0)
        waiting = waiting or list(order if rule == "round_robin" else each)
        turn = waiting[:1] if rule == "round_robin" else waiting
        _, sample, column = max((value[i, j], -i, j) for i in free for j in turn)
        picks.append((-sample, column))
        if rule != "balanced":
            waiting.remove(column)
    return picks


@pytest.mark.parametrize("ahead", [1, 7, 512])
@pytest.mark.parametrize("rule", ["round_robin", "doubly_greedy", "balanced"])
def test_a_column_whose_best_is_a_duplicate_takes_its_next_best(
    rule: str, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its turn does not lapse, whoever took what it is alike to; with quotas and where nothing is left, too."""
    monkeypatch.setattr(columns, "ASKED_AHEAD", ahead)
    rows, family, _ = families(120, 40, 7)
    draw = np.random.default_rng(8)
    table = (draw.normal(size=(40, 3))[family] + 0.01 * draw.normal(size=(120, 3))).astype(np.float32)
    ones, order = np.zeros(120, dtype=np.int64), np.array([2, 0, 1, 0])
    how: dict[str, Any] = {"rule": rule, "columns": order if rule == "round_robin" else None}
    contested = (draw.normal(size=(40, 1))[family] + 0.01 * draw.normal(size=(120, 3))).astype(np.float32)
    for wanted, count in itertools.product((table, contested), (1, 18, 90)):
        right = in_turn(wanted, rows, count, rule, order.tolist())
        got = choosing.choose(ArrayTable(wanted), ones, count, None, lambda i: rows[i], ALIKE, **how)
        assert list(zip(got.picks.tolist(), got.column.tolist(), strict=True)) == right
        assert len(right) == min(count, len(set(family)))
    if rule == "round_robin":
        served = np.bincount([j for _, j in in_turn(table, rows, 24, rule, order.tolist())])
        assert served.tolist() == [12, 6, 6], "two of each four turns are the first column's"
    domains = family % 2
    quotas = choosing.choose(ArrayTable(table), domains, 8, np.array([5, 3]), lambda i: rows[i], ALIKE, **how)
    assert np.bincount(domains[quotas.picks]).tolist() == [5, 3] and len(set(family[quotas.picks])) == 8
    if rule == "round_robin":
        turns = [quotas.column[domains[quotas.picks] == d].tolist() for d in (0, 1)]
        assert turns == [[2, 0, 1, 0, 2], [0, 1, 0]], "the turns go on from one domain to the next"
