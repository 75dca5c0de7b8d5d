"""Decision rules: from a table of scores, N samples by M columns, to the samples that are taken.

Every rule reads the table in blocks and holds about 4 x count numbers of it; ties go to the lower sample id.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.scoring.batches import Ids
from dataflex.scoring.decide.columns import BestLists, Mask, finite_blocks, moments
from dataflex.scoring.decide.table import ScoreTable
from dataflex.scoring.decide.vote import vote
from dataflex.utils.errors import UserError, nearest

RULES = ("max", "mean", "round_robin", "balanced", "vote", "doubly_greedy")


@dataclass(frozen=True)
class Decision:
    """picks: int64 [k] sample ids, best first. column: int64 [k], the column that each of them serves.

    score: [k], what each was taken for. every: [N], what every sample is ranked by, where the rule ranks by one number
    (max float32, mean float64, vote its votes; NaN for those that were not asked about), else None.
    """

    picks: Ids
    column: Ids
    score: NDArray[Any]
    every: NDArray[Any] | None = None


def check_rule(name: str, key: str = "aggregate") -> None:
    """UserError, in the name of ``key``, where there is no such rule."""
    if name not in RULES:
        raise UserError(f"{key}: '{name}'{nearest(name, RULES)}; valid: {', '.join(RULES)}")


def decide(
    table: ScoreTable,
    count: int,
    rule: str,
    among: Ids | None = None,
    *,
    vote_share: float | None = None,
    turn: int = 0,
    order: Ids | None = None,
    source: str = "decision",
) -> Decision:
    """Take ``count`` samples by ``rule``, one of `RULES`; as though the table held the rows of ``among`` alone.

    among: distinct sample ids, all by default; at least ``count``. vote_share: the share of the samples for which a
    column votes, by default that which is taken. order: columns in the order in which a round robin serves
    them, over and over; each once by default. turn: the place in it that takes first. source: begins the UserError for
    scores that are not finite.
    """
    check_rule(rule)
    mask = np.ones(table.shape[0], dtype=np.bool_) if among is None else np.zeros(table.shape[0], dtype=np.bool_)
    if among is not None:
        mask[among] = True
    assert 0 <= count <= mask.sum(), f"{count} of {mask.sum()} samples asked for"
    if rule in ("max", "mean"):
        return _by_row(table, count, rule, mask, source)
    if count == 0:
        nothing = np.empty(0, dtype=np.int64)
        return Decision(nothing, nothing, np.empty(0))
    if rule == "vote":
        return Decision(*vote(table, count, mask, vote_share, source))
    if rule == "round_robin":
        return _round_robin(table, count, mask, source, turn, order)
    return (_balanced if rule == "balanced" else _doubly_greedy)(table, count, mask, source)


def _by_row(table: ScoreTable, count: int, rule: str, mask: Mask, source: str) -> Decision:
    """The samples of the largest maximum, or mean, over the columns."""
    every: NDArray[Any] = np.full(table.shape[0], np.nan, dtype=np.float32 if rule == "max" else np.float64)
    for ids, block in finite_blocks(table, mask, source):
        every[ids] = block.max(axis=1) if rule == "max" else block.mean(axis=1, dtype=np.float64)
    picks = np.argsort(-every, kind="stable")[:count].astype(np.int64)  # NaN last
    column = table.rows(picks).argmax(axis=1).astype(np.int64)
    return Decision(picks, column, every[picks], every)


def _round_robin(
    table: ScoreTable, count: int, mask: Mask, source: str, first: int, order: Ids | None = None
) -> Decision:
    """The columns take turns; each takes its best sample that is not taken yet (arXiv 2503.01807)."""
    lists, taken = BestLists.to_take(table, mask, count, source), _Taken()
    columns = list(range(table.shape[1])) if order is None else order.tolist()
    for turn in range(first, first + count):
        column = columns[turn % len(columns)]
        score, sample = lists.best(column)
        taken.add(sample, column, score)
        lists.take(sample)
    return taken.decision()


def _doubly_greedy(table: ScoreTable, count: int, mask: Mask, source: str) -> Decision:
    """In rounds: the largest score of a free sample and a column that this round has not served (arXiv 2602.14696)."""
    lists, taken = BestLists.to_take(table, mask, count, source), _Taken()
    waiting: list[tuple[float, int, int]] = []
    for _ in range(count):
        if not waiting:
            waiting = [_entry(lists, column) for column in range(table.shape[1])]
            heapq.heapify(waiting)
        while not lists.free[waiting[0][1]]:
            heapq.heapreplace(waiting, _entry(lists, waiting[0][2]))
        score, sample, column = heapq.heappop(waiting)
        taken.add(sample, column, -score)
        lists.take(sample)
    return taken.decision()


def _entry(lists: BestLists, column: int) -> tuple[float, int, int]:
    score, sample = lists.best(column)
    return -score, sample, column


def _balanced(table: ScoreTable, count: int, mask: Mask, source: str) -> Decision:
    """BIDS (arXiv 2501.12147): standardised columns; the largest lead over the mean of what was taken so far.

    With z the table whose columns have mean 0 and deviation 1 over the samples (a constant column is 0), each step
    takes the largest z_ij - mean of the taken z_.j over free samples i and columns j. score: that lead.
    """
    mean, deviation = moments(table, mask, source)
    scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    lists, taken = BestLists.to_take(table, mask, count, source), _Taken()
    columns = table.shape[1]
    held = _HeldRows(table, lists, -(-4 * count // columns))
    heads, scores = np.full(columns, -1, dtype=np.int64), np.empty(columns)
    total = np.zeros(columns)
    for done in range(count):
        for column in np.flatnonzero(~lists.free[heads] | (heads < 0)).tolist():
            scores[column], heads[column] = lists.best(column)
        lead = (scores - mean) * scale - total / max(1, done)
        best = np.flatnonzero(lead == lead.max())
        column = int(best[heads[best].argmin()])
        sample = int(heads[column])
        taken.add(sample, column, float(lead[column]))
        total += (held.row(sample).astype(np.float64) - mean) * scale
        lists.take(sample)
    return taken.decision()


class _HeldRows:
    """Rows of the samples that come next in the lists, read together. ahead: so many of each list."""

    def __init__(self, table: ScoreTable, lists: BestLists, ahead: int) -> None:
        self.table, self.lists, self.ahead = table, lists, ahead
        self.ids = np.empty(0, dtype=np.int64)

    def row(self, sample: int) -> NDArray[np.float32]:
        """float32 [M], of a sample at the head of a list."""
        at = int(np.searchsorted(self.ids, sample))
        if at == len(self.ids) or self.ids[at] != sample:
            self.ids = self.lists.ahead(self.ahead)
            self.values = self.table.rows(self.ids)
            at = int(np.searchsorted(self.ids, sample))
        found: NDArray[np.float32] = self.values[at]
        return found


class _Taken:
    """Picks in the order in which they are taken."""

    def __init__(self) -> None:
        self.picks: list[int] = []
        self.column: list[int] = []
        self.score: list[float] = []

    def add(self, sample: int, column: int, score: float) -> None:
        self.picks.append(sample)
        self.column.append(column)
        self.score.append(score)

    def decision(self) -> Decision:
        ids = np.array(self.picks, dtype=np.int64), np.array(self.column, dtype=np.int64)
        return Decision(*ids, np.array(self.score))
