"""Streaming top-k and choices, against plain sorting and a planted truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataflex.scoring.decide.choose import domain_quotas
from dataflex.scoring.decide.topk import FEATURES, blocks, cosine_top_k, stream_scores
from dataflex.scoring.kept.store import ShardStore, StoreReader
from dataflex.utils.errors import UserError
from tests.scoring.one_column import choose

CPU = torch.device("cpu")


class InMemory:
    """Rows in shards without a disk."""

    def __init__(self, rows: np.ndarray, shard: int) -> None:
        self.parts = [rows[at : at + shard] for at in range(0, len(rows), shard)]

    def __len__(self) -> int:
        return len(self.parts)

    def read(self, index: int, name: str) -> Any:
        assert name == FEATURES
        return self.parts[index]


def exact_cosines(rows: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Largest cosine to any direction, float64; 0 for a row of zeros."""
    wide, unit = rows.astype(np.float64), directions / np.linalg.norm(directions, axis=1, keepdims=True)
    length = np.maximum(np.linalg.norm(wide, axis=1), 1e-300)
    best: np.ndarray = (wide @ unit.T).max(axis=1) / length
    return best


@pytest.mark.parametrize("merge", [1, 1000])
@pytest.mark.parametrize(("rows", "count", "shard"), [(1, 1, 4), (50, 7, 8), (50, 50, 50), (50, 80, 13), (50, 0, 8)])
def test_top_k_is_that_of_a_float64_sort(
    monkeypatch: pytest.MonkeyPatch, rows: int, count: int, shard: int, merge: int
) -> None:
    monkeypatch.setattr("dataflex.scoring.decide.topk.MERGE", merge)
    monkeypatch.setattr("dataflex.scoring.decide.topk.BLOCK_BYTES", 16 * 2 * 3)  # three rows a block
    draw = np.random.default_rng(rows + count)
    features = draw.standard_normal((rows, 16)).astype(np.float16)
    directions = draw.standard_normal((3, 16))
    places, best = cosine_top_k(InMemory(features, shard), torch.from_numpy(directions), count, CPU)
    exact = exact_cosines(features, directions)
    expected = np.argsort(-exact, kind="stable")[:count]
    assert places.tolist() == expected.tolist()
    np.testing.assert_allclose(best, exact[expected], atol=1e-6)
    scores = stream_scores(InMemory(features, shard), rows, lambda block: block.sum(dim=1, keepdim=True), 1, CPU)[:, 0]
    np.testing.assert_allclose(scores, features.astype(np.float64).sum(axis=1), atol=1e-5)


def test_ties_go_to_the_earlier_row_and_zeros_score_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataflex.scoring.decide.topk.BLOCK_BYTES", 4 * 2 * 2)
    monkeypatch.setattr("dataflex.scoring.decide.topk.MERGE", 1)
    features = np.zeros((9, 4), dtype=np.float16)
    features[[1, 4, 7], 0] = [2, 1, 3]  # the same direction, so the same cosine
    features[8, 0] = -1
    places, best = cosine_top_k(InMemory(features, 2), torch.eye(4)[:1], 5, CPU)
    assert places.tolist() == [1, 4, 7, 0, 2] and best.tolist() == [1, 1, 1, 0, 0]


def test_blocks_of_a_store_are_its_rows_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataflex.scoring.decide.topk.BLOCK_BYTES", 8 * 2 * 4)
    rows = np.random.default_rng(0).standard_normal((21, 8)).astype(np.float16)
    store = ShardStore(tmp_path, {}, np.arange(21), 10)
    for index in range(len(store)):
        store.write(index, {FEATURES: rows[store.places(index)]})
    found = list(blocks(StoreReader(tmp_path), CPU))
    assert [at for at, _ in found] == [0, 4, 8, 10, 14, 18, 20]
    assert np.array_equal(torch.cat([block for _, block in found]).numpy(), rows.astype(np.float32))


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    share=st.floats(0.01, 1.0),
    words=st.sampled_from(["proportional", None]),
)
def test_quotas_add_up_and_are_filled_with_the_best(sizes: list[int], share: float, words: str | None) -> None:
    names = [f"d{i}" for i in range(len(sizes))]
    domains = np.repeat(np.arange(len(sizes)), sizes)
    count = max(1, int(share * len(domains)))
    scores = np.random.default_rng(sum(sizes)).standard_normal(len(domains))
    quotas = domain_quotas(words, count, names, np.array(sizes))
    picks = choose(scores, domains, count, quotas)
    assert len(picks) == count == len(set(picks.tolist()))
    assert (np.diff(scores[picks]) <= 0).all()
    if quotas is None:
        assert set(picks.tolist()) == set(np.argsort(-scores)[:count].tolist())
        return
    assert quotas.sum() == count and np.abs(quotas - np.array(sizes) * count / sum(sizes)).max() < 1
    for d, quota in enumerate(quotas):
        mine = np.flatnonzero(domains == d)
        assert set(picks[domains[picks] == d].tolist()) == set(mine[np.argsort(-scores[mine])[:quota]].tolist())


def test_quotas_by_name_and_their_errors() -> None:
    sizes = np.array([10, 5, 4])
    assert domain_quotas({"c": 1, "a": 2}, 7, ["a", "b", "c"], sizes).tolist() == [5, 0, 2]  # type: ignore[union-attr]
    assert domain_quotas("equal", 8, ["a", "b", "c"], sizes).tolist() == [3, 3, 2]  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"no dataset 'maths' .did you mean 'math'..; scored: math, code"):
        domain_quotas({"maths": 1}, 2, ["math", "code"], np.array([3, 3]))
    with pytest.raises(UserError, match="6 samples of 'c' are asked for, it has 4"):
        domain_quotas({"c": 1}, 6, ["a", "b", "c"], sizes)


@pytest.mark.parametrize("with_quotas", [False, True])
def test_planted_near_duplicates_are_taken_once(with_quotas: bool) -> None:
    """200 rows of 40 originals and four noisy copies of each; the best of each family stays, in order."""
    draw = np.random.default_rng(1)
    originals = draw.standard_normal((40, 64))
    family = np.arange(200) % 40
    rows = (originals[family] + 0.05 * draw.standard_normal((200, 64))).astype(np.float16)
    scores, domains = draw.standard_normal(200), family % 2
    quotas = np.array([12, 8]) if with_quotas else None
    picks = choose(scores, domains, 20, quotas, lambda ids: rows[ids], alike=0.9)
    left, seen, expected = [12, 8] if with_quotas else [20, 20], set(), []
    for place in np.argsort(-scores):
        if len(expected) < 20 and family[place] not in seen and left[domains[place]]:
            seen.add(family[place])
            left[domains[place]] -= 1
            expected.append(place)
    assert picks.tolist() == expected
    everything = choose(scores, domains, 200, None, lambda ids: rows[ids], alike=0.9)
    assert len(everything) == 40


def test_scores_that_are_not_finite_are_named() -> None:
    with pytest.raises(UserError, match=r"^select: scores of sample ids \[1, 3\] are not finite"):
        choose(np.array([0, np.nan, 1, np.inf]), np.zeros(4, dtype=int), 2)
