"""Decision rules over a score table: against plain float64 loops, and against planted truths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.scoring.decide import columns
from dataflex.scoring.decide.rules import RULES, Decision, decide
from dataflex.scoring.decide.table import ArrayTable, ScoreTable, ShardTable
from dataflex.scoring.decide.vector_table import VectorTable
from dataflex.scoring.kept.vectors import Vectors
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
        "vectors": (
            VectorTable(Vectors.of(vectors.astype(np.float32), 8), targets.astype(np.float32), torch.device("cpu")),
            right,
        ),
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


def ties() -> np.ndarray:
    """float32 [40, 6] of few values: equal scores, equal rows, and a column of constants."""
    table = np.random.default_rng(6).integers(0, 3, (40, 6)).astype(np.float32)
    table[20:] = table[:20]
    table[:, 4] = 7.0
    return table


@pytest.mark.parametrize("rule", RULES)
def test_equal_scores_go_to_the_lower_id(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "LEAST", 0)
    for count in (1, 7, 30, 40):
        right = LOOPS[rule](ties().astype(np.float64), count)
        for block_rows in (40, 3):
            assert pairs(decide(ArrayTable(ties(), block_rows), count, rule)) == right, (count, block_rows)


@pytest.mark.parametrize("rule", RULES)
def test_tables_of_other_shapes(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One column, more columns than samples, a single sample; everything taken."""
    monkeypatch.setattr(columns, "LEAST", 0)
    for shape in ((30, 1), (7, 30), (1, 1), (1, 5)):
        table = np.random.default_rng(7).normal(size=shape).astype(np.float32)
        for count in {1, (shape[0] + 1) // 2, shape[0]}:
            got = decide(ArrayTable(table, block_rows=4), count, rule)
            assert pairs(got) == LOOPS[rule](table.astype(np.float64), count)
            assert got.picks.dtype == got.column.dtype == np.int64 and len(got.score) == count
    nothing = decide(ArrayTable(table), 0, rule)
    assert len(nothing.picks) == len(nothing.column) == len(nothing.score) == 0


def test_what_a_pick_was_taken_for() -> None:
    table = made()
    wide = table.astype(np.float64)
    for rule, every in (("max", table.max(axis=1)), ("mean", wide.mean(axis=1))):
        got = decide(ArrayTable(table, 50), 40, rule)
        assert got.every is not None
        np.testing.assert_allclose(got.every, every, rtol=1e-12)
        np.testing.assert_array_equal(got.score, got.every[got.picks])
    for rule in ("round_robin", "doubly_greedy"):
        got = decide(ArrayTable(table, 50), 40, rule)
        np.testing.assert_array_equal(got.score, table[got.picks, got.column])
        assert np.bincount(got.column, minlength=M).tolist() == [2] * M, "every column is served equally often"
    got = decide(ArrayTable(table, 50), 40, "vote")
    votes = (wide >= np.sort(wide, axis=0)[-40]).sum(axis=1)
    np.testing.assert_array_equal(got.every, votes)
    np.testing.assert_array_equal(got.score, votes[got.picks])
    got = decide(ArrayTable(table, 50), 2, "balanced")
    z = (wide - wide.mean(axis=0)) / wide.std(axis=0)
    first, second = got.picks
    np.testing.assert_allclose(got.score, [z[first].max(), (z[second] - z[first]).max()], rtol=1e-9)
    got = decide(ArrayTable(table, 50), 5, "max", np.arange(100, 200))
    assert got.every is not None and np.isnan(got.every[:100]).all() and not np.isnan(got.every[100:200]).any()


def test_the_share_that_a_column_votes_for() -> None:
    """Each of three columns votes for its best two of ten: sample 4 has three votes, 7 two, 1 one."""
    table = np.zeros((10, 3), dtype=np.float32)
    table[4], table[7], table[1] = 9, [8, 8, 1], [2, 2, 8]
    assert decide(ArrayTable(table), 3, "vote", vote_share=0.15).score.tolist() == [3, 2, 1]
    wide = decide(ArrayTable(table), 3, "vote", vote_share=0.3)
    assert wide.picks.tolist() == [4, 7, 1] and wide.score.tolist() == [3, 3, 3]
    assert decide(ArrayTable(table), 1, "vote", vote_share=0.01).score.tolist() == [3]


def test_a_round_robin_begins_where_it_is_told_to() -> None:
    got = decide(ArrayTable(made()), 5, "round_robin", turn=18)
    assert got.column.tolist() == [18, 19, 0, 1, 2]


def test_lists_that_run_out_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """All columns want the same samples, so that each list is used up by the others."""
    monkeypatch.setattr(columns, "LEAST", 0)
    made_of: list[int] = []
    fill = columns.BestLists._fill

    def counted(lists: columns.BestLists) -> None:
        fill(lists)
        made_of.append(max(len(ids) for ids in lists.ids))

    monkeypatch.setattr(columns.BestLists, "_fill", counted)
    table = np.tile(np.arange(300, dtype=np.float32)[:, None], (1, 20))
    got = decide(ArrayTable(table, 64), 100, "round_robin")
    assert got.picks.tolist() == list(range(299, 199, -1))
    assert made_of == [20] * 5, "4 x 100 / 20 of each column at a time"


def test_balanced_reads_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 x count / M of each column, not the table: all columns want other samples."""
    monkeypatch.setattr(columns, "LEAST", 0)
    asked: list[int] = []
    table = made()

    class Counting(ArrayTable):
        def rows(self, ids: Any) -> Any:
            asked.append(len(ids))
            return super().rows(ids)

    got = decide(Counting(table, 37), 20, "balanced")
    assert pairs(got) == balanced(table.astype(np.float64), 20) and 0 < max(asked) <= 80


def test_max_starves_a_column_of_small_scores_and_turns_do_not() -> None:
    """The third column's scores are a hundredth of the others'."""
    table = np.abs(np.random.default_rng(8).normal(size=(200, 3))).astype(np.float32) * np.float32([1, 1, 0.01])
    counts = {rule: np.bincount(decide(ArrayTable(table), 60, rule).column, minlength=3).tolist() for rule in RULES}
    assert counts["max"][2] == counts["mean"][2] == 0
    assert counts["round_robin"] == counts["doubly_greedy"] == [20, 20, 20]
    assert min(counts["balanced"]) >= 12 and min(counts["vote"]) >= 12


def test_balanced_goes_to_the_column_that_has_least() -> None:
    """Two kinds of samples, each good for one column; the second column's are rarer and its scores lower."""
    table = np.full((60, 2), 0.0, dtype=np.float32)
    table[:50, 0], table[50:, 1] = 1.0 + np.arange(50) / 1000, 0.1 + np.arange(10) / 10000
    got = decide(ArrayTable(table), 12, "balanced")
    assert np.bincount(got.column).tolist()[1] >= 5 and np.bincount(
        decide(ArrayTable(table), 12, "max").column
    ).tolist() == [12]


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(UserError, match=r"^aggregate: 'rond_robin' \(did you mean 'round_robin'\?\); valid: max, mean"):
        decide(ArrayTable(made()), 3, "rond_robin")
