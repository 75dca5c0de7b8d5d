"""Nearest neighbours against plain float64 on every pair: order, ties, zero vectors, shards, ranks; faiss beyond."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dataflex.scoring.decide import neighbours
from dataflex.scoring.decide.neighbours import nearest
from dataflex.scoring.decide.rules import RULES, decide
from dataflex.scoring.decide.table import ArrayTable
from dataflex.scoring.decide.vector_table import VectorTable
from dataflex.scoring.kept.vectors import Vectors
from tests.distributed import run_ranks

CPU = torch.device("cpu")


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def planted(pool: int = 300, targets: int = 20, width: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors; sample 7 is zeros, 3 and 100 to 109 are one vector, which is target 2's too."""
    draw = np.random.default_rng(0)
    vectors, wanted = draw.normal(size=(pool, width)), draw.normal(size=(targets, width))
    if pool > 200:
        vectors[7], vectors[100:110], wanted[2:3] = 0, vectors[3], vectors[3]
    return unit(vectors), unit(wanted)


def in_float64(vectors: np.ndarray, targets: np.ndarray, among: np.ndarray | None = None) -> tuple[Any, Any]:
    """Ids by (distance, id) and distances of every pair."""
    rows, wanted = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
        for x in (vectors.astype(np.float64), targets.astype(np.float64))
    )
    apart = np.array([[np.sqrt(((row - to) ** 2).sum()) for row in rows] for to in wanted])
    apart[:, ~rows.any(axis=1)] = apart[~wanted.any(axis=1)] = 2**0.5
    if among is not None:
        apart[:, ~among] = np.inf
    order = np.array([sorted(range(len(rows)), key=lambda i: (row[i], i)) for row in apart])
    return order, np.take_along_axis(apart, order, axis=1)


@pytest.mark.parametrize(("pool", "targets", "count"), [(300, 20, 50), (300, 1, 300), (9, 40, 9), (1, 3, 1)])
def test_they_are_those_of_every_pair_in_float64(pool: int, targets: int, count: int) -> None:
    vectors, wanted = planted(pool, targets)
    found = nearest(Vectors.of(vectors, 64), wanted, count, CPU)
    ids, distances = in_float64(vectors, wanted)
    assert (found.ids == ids[:, :count]).all() and found.ids.dtype == np.int64
    np.testing.assert_allclose(found.distances, distances[:, :count], atol=1e-12)


def test_equal_vectors_are_equally_far_and_come_by_id() -> None:
    vectors, wanted = planted()
    found = nearest(Vectors.of(vectors, 37), wanted, 11, CPU)
    assert found.ids[2].tolist() == [3, *range(100, 110)]
    assert len(set(found.distances[2])) == 1 and found.distances[2, 0] == 0


def test_a_vector_of_zeros_is_as_far_as_one_at_a_right_angle() -> None:
    vectors = np.array([[0, 0], [0.6, 0.8], [-0.6, 0.8], [1, 0]], dtype=np.float32)
    found = nearest(Vectors.of(vectors, 3), np.array([[1, 0], [0, 0]], dtype=np.float32), 4, CPU)
    assert found.ids.tolist() == [[3, 1, 0, 2], [0, 1, 2, 3]]
    np.testing.assert_allclose(found.distances, [[0, 0.8**0.5, 2**0.5, 3.2**0.5], [2**0.5] * 4], atol=1e-7)


def test_only_those_asked_about_are_found() -> None:
    vectors, wanted = planted()
    among = np.zeros(300, dtype=bool)
    among[5::7] = True
    found = nearest(Vectors.of(vectors, 37), wanted, int(among.sum()), CPU, among)
    assert (found.ids == in_float64(vectors, wanted, among)[0][:, : among.sum()]).all()


@pytest.mark.parametrize("again", [True, False])
def test_bits_do_not_depend_on_how_the_pool_is_cut(again: bool) -> None:
    vectors, wanted = planted()
    one, other = (nearest(Vectors.of(vectors, size), wanted, 60, CPU, again=again) for size in (300, 41))
    assert (one.ids == other.ids).all() and (one.distances == other.distances).all()


def test_keys_order_by_score_then_by_id() -> None:
    scores = torch.tensor([[0.0, -0.0, 0.5, -0.5, 0.5, -1.0, 1.0, 1e-30, -1e-30]])
    ids = torch.tensor([4, 2, 9, 1, 3, 0, 8, 7, 6])
    order = neighbours._keys(scores, ids)[0].argsort(descending=True)
    assert ids[order].tolist() == [8, 3, 9, 7, 2, 4, 6, 1, 0]
    found, back = neighbours._of_keys(neighbours._keys(scores, ids))
    assert found.tolist() == [ids.tolist()] and (back == scores.numpy()).all()


def test_beyond_the_limit_faiss_looks_at_the_nearest_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    vectors, wanted = planted(2000)
    exact = nearest(Vectors.of(vectors), wanted, 10, CPU)
    monkeypatch.setattr(neighbours, "MOST_PRODUCTS", 1)
    monkeypatch.setattr("dataflex.scoring.decide.approximate.LOOKED_AT", 1)
    said: list[str] = []
    monkeypatch.setattr(neighbours.logger, "info", said.append)
    neighbours._asks_faiss.cache_clear()
    few, every = (nearest(Vectors.of(vectors, 300), wanted, count, CPU) for count in (10, 2000))
    assert len(said) == 1 and "faiss looks at the nearest cells alone, and may miss some" in said[0]
    assert 0.05 < np.mean([len(set(a) & set(b)) / 10 for a, b in zip(few.ids, exact.ids, strict=True)]) < 1
    assert (np.sort(every.ids) == np.arange(2000)).all(), "more cells are looked at until there are enough"


def test_a_table_of_vectors_is_the_products_and_every_rule_reads_it() -> None:
    vectors, wanted = planted()
    table = VectorTable(Vectors.of(vectors, 37), wanted, CPU)
    whole = np.concatenate([block for _, block in table.blocks()])
    assert [start for start, _ in table.blocks()] == list(range(0, 300, 37)) and table.shape == (300, 20)
    np.testing.assert_allclose(whole, vectors.astype(np.float64) @ wanted.T, atol=1e-6)
    ids = np.random.default_rng(1).permutation(300)[:50]
    assert (table.rows(ids) == whole[ids]).all()
    for rule in RULES:
        got, want = decide(table, 40, rule), decide(ArrayTable(whole), 40, rule)
        assert (got.picks == want.picks).all() and (got.column == want.column).all()


def on_ranks() -> dict[str, Any]:
    """Neighbours, a table, rows and the approximate ones, of vectors that the ranks share."""
    vectors, wanted = planted()
    shared = Vectors.of(vectors, 37)
    found = nearest(shared, wanted, 45, CPU)
    table = VectorTable(shared, wanted, CPU)
    whole = np.concatenate([block for _, block in table.blocks()])
    neighbours.MOST_PRODUCTS = 1
    some = nearest(shared, wanted, 45, CPU)
    return {
        "held": sum(len(rows) for _, rows in shared.parts),
        "nearest": [found.ids.tolist(), found.distances.tolist()],
        "table": [whole.tolist(), table.rows(np.array([299, 0, 37])).tolist()],
        "rows": shared.rows(np.array([40, 3, 299]), CPU).tolist() == vectors[[40, 3, 299]].tolist(),
        "some": [some.ids.tolist(), some.distances.tolist()],
    }


def test_ranks_share_the_pool_and_find_the_same() -> None:
    one, two = (run_ranks("tests.scoring.test_neighbours:on_ranks", world) for world in (1, 2))
    assert [rank["held"] for rank in two] == [4 * 37 + 4, 4 * 37] and all(rank["rows"] for rank in two)
    for key in ("nearest", "table", "some"):
        assert [rank[key] for rank in (*one, *two)] == [one[0][key]] * 3, key
