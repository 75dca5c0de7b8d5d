"""Decision rules over a score table: against plain float64 loops, and against planted truths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dataflex.scoring.decide import columns
from dataflex.scoring.decide.rules import RULES, Decision, decide
from dataflex.scoring.decide.table import ArrayTable, ProductTable, ScoreTable, ShardTable
from dataflex.utils.errors import UserError

N, M = 300, 20
Loop = Callable[[np.ndarray, int], list[tuple[int, int]]]


def by_row(reduce: Callable[..., Any]) -> Loop:
    def loop(table: np.ndarray, count: int) -> list[tuple[int, int]]:
        values = reduce(table, axis=1)
        return [(i, int(table[i].argmax())) for i in sorted(range(len(table)), key=lambda i: (-values[i], i))[:count]]

    return loop


def round_robin(table: np.ndarray, count: int) -> list[tuple[int, int]]:
    picks: list[tuple[int, int]] = []
    for turn in range(count):
        j = turn % table.shape[1]
        free = set(range(len(table))) - {i for i, _ in picks}
        picks.append((min(free, key=lambda i: (-table[i, j], i)), j))
    return picks


def doubly_greedy(table: np.ndarray, count: int) -> list[tuple[int, int]]:
    picks: list[tuple[int, int]] = []
    waiting: set[int] = set()
    for _ in range(count):
        waiting = waiting or set(range(table.shape[1]))
        free = set(range(len(table))) - {i for i, _ in picks}
        sample, column = min(((i, j) for i in free for j in waiting), key=lambda p: (-table[p], p))
        picks.append((sample, column))
        waiting.remove(column)
    return picks


def balanced(table: np.ndarray, count: int) -> list[tuple[int, int]]:
    deviation = table.std(axis=0)
    z = (table - table.mean(axis=0)) / np.where(deviation > 0, deviation, np.inf)
    picks: list[tuple[int, int]] = []
    for _ in range(count):
        mean = z[[i for i, _ in picks]].mean(axis=0) if picks else np.zeros(table.shape[1])
        lead = z - mean
        lead[[i for i, _ in picks]] = -np.inf
        picks.append(tuple(np.argwhere(lead == lead.max())[0].tolist()))
    return picks


def vote(table: np.ndarray, count: int) -> list[tuple[int, int]]:
    votes = (table >= np.percentile(table, 100 * (1 - count / len(table)), axis=0)).sum(axis=1)
    ranks = np.stack([[((c < x).mean() + (c <= x).mean()) / 2 for x in c] for c in table.T], axis=1)
    order = sorted(range(len(table)), key=lambda i: (-votes[i], -ranks[i].sum().round(9), i))
    return [(i, int(ranks[i].argmax())) for i in order[:count]]


LOOPS: dict[str, Loop] = {
    "max": by_row(np.max),
    "mean": by_row(np.mean),
    "round_robin": round_robin,
    "balanced": balanced,
    "vote": vote,
    "doubly_greedy": doubly_greedy,
}


def made() -> np.ndarray:
    """float32 [300, 20]: columns of different size and place, some that many samples are alike in."""
    draw = np.random.default_rng(3)
    table = draw.normal(size=(N, M)) * draw.uniform(0.1, 3, M) + draw.normal(size=M)
    return table.astype(np.float32)


def pairs(decision: Decision) -> list[tuple[int, int]]:
    return list(zip(decision.picks.tolist(), decision.column.tolist(), strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_its_formula(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, in odd blocks with lists that run out, and among some of the samples alone."""
    table = made()
    right = LOOPS[rule](table.astype(np.float64), 60)
    assert pairs(decide(ArrayTable(table), 60, rule)) == right
    monkeypatch.setattr(columns, "LEAST", 0)
    assert pairs(decide(ArrayTable(table, block_rows=37), 60, rule)) == right
    among = np.random.default_rng(4).permutation(N)[:150]
    part = np.sort(among)
    right = [(int(part[i]), j) for i, j in LOOPS[rule](table[part].astype(np.float64), 40)]
    assert pairs(decide(ArrayTable(table, block_rows=41), 40, rule, among)) == right


class InShards:
    """Rows in shards without a disk."""

    def __init__(self, table: np.ndarray, shard: int) -> None:
        self.parts = [table[at : at + shard] for at in range(0, len(table), shard)]

    def __len__(self) -> int:
        return len(self.parts)

    def read(self, index: int, name: str) -> Any:
        assert name == "scores"
        return self.parts[index]


def tables() -> dict[str, tuple[ScoreTable, np.ndarray]]:
    """Each kind of table, and what it must hold; whole numbers, whose products are exact."""
    draw = np.random.default_rng(5)
    vectors, targets = draw.integers(-4, 5, (101, 6)), draw.integers(-4, 5, (7, 6))
    right = (vectors @ targets.T).astype(np.float32)
    return {
        "array": (ArrayTable(right, block_rows=10), right),
        "product": (ProductTable(vectors.astype(np.float16), targets.astype(np.float32), block_rows=8), right),
        "shards": (ShardTable(InShards(right, 30), "scores"), right),
    }


@pytest.mark.parametrize("kind", tables())
def test_a_table_is_read_whole_and_by_rows(kind: str) -> None:
    table, right = tables()[kind]
    assert table.shape == (101, 7)
    parts = list(table.blocks())
    assert [at for at, _ in parts] == np.cumsum([0, *(len(part) for _, part in parts[:-1])]).tolist()
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), right)
    ids = np.array([100, 0, 33, 33, 64])
    rows = table.rows(ids)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, right[ids])


def test_scores_that_are_not_finite_are_named() -> None:
    table = made()
    table[7, 2], table[250, 0] = np.nan, np.inf
    for rule in RULES:
        with pytest.raises(UserError, match=r"^less at step 3: scores of sample ids \[7, 250\] are not finite$"):
            decide(ArrayTable(table), 5, rule, source="less at step 3")
    assert decide(ArrayTable(table), 1, "max", np.array([3, 4])).picks.tolist() in ([3], [4])
