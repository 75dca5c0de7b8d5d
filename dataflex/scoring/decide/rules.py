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
from dataflex.scoring.decide.columns import BestLists, Gate, Mask, finite_blocks, moments
from dataflex.scoring.decide.table import ScoreTable
from dataflex.scoring.decide.vote import vote
from dataflex.utils.errors import UserError, nearest

RULES = ("max", "mean", "round_robin", "balanced", "vote", "doubly_greedy")
IN_TURNS = ("round_robin", "balanced", "doubly_greedy")


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
    gate: Gate | None = None,
) -> Decision:
    """Take ``count`` samples by ``rule``, one of `RULES`; as though the table held the rows of ``among`` alone.

    among: distinct sample ids, all by default; at least ``count``. vote_share: the share of the samples for which a
    column votes, by default that which is taken. order: columns in the order in which a round robin serves
    them, over and over; each once by default. turn: the place in it that takes first. source: begins the UserError for
    scores that are not finite. gate: of the rules in which columns take in turn (`IN_TURNS`), asked of a sample that
    would be taken, once all that were before are; with it fewer than ``count`` may be found.
    """
    check_rule(rule)
    assert gate is None or rule in IN_TURNS
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
    lists = BestLists.to_take(table, mask, count, source, gate)
    if rule == "round_robin":
        return _round_robin(lists, count, turn, order)
    return _doubly_greedy(lists, count) if rule == "doubly_greedy" else _balanced(table, lists, count, mask, source)


def _by_row(table: ScoreTable, count: int, rule: str, mask: Mask, source: str) -> Decision:
    """The samples of the largest maximum, or mean, over the columns."""
    every: NDArray[Any] = np.full(table.shape[0], np.nan, dtype=np.float32 if rule == "max" else np.float64)
    for ids, block in finite_blocks(table, mask, source):
        every[ids] = block.max(axis=1) if rule == "max" else block.mean(axis=1, dtype=np.float64)
    picks = np.argsort(-every, kind="stable")[:count].astype(np.int64)  # NaN last
    column = table.rows(picks).argmax(axis=1).astype(np.int64)
    return Decision(picks, column, every[picks], every)


def _round_robin(lists: BestLists, count: int, first: int, order: Ids | None = None) -> Decision:
    """The columns take turns; each takes its best sample that is not taken yet (arXiv 2503.01807)."""
    taken = _Taken()
    columns = list(range(len(lists.ids))) if order is None else order.tolist()
    for turn in range(first, first + count):
        column = columns[turn % len(columns)]
        best = lists.best(column)
        if best is None:
            break
        taken.add(best[1], column, best[0])
        lists.take(best[1])
    return taken.decision()


def _doubly_greedy(lists: BestLists, count: int) -> Decision:
    """In rounds: the largest score of a free sample and a column that this round has not served (arXiv 2602.14696)."""
    taken = _Taken()
    waiting: list[tuple[float, int, int]] = []
    while len(taken.picks) < count and lists.left > 0:
        if not waiting:
            waiting = [entry for column in range(len(lists.ids)) for entry in _entry(lists, column)]
            heapq.heapify(waiting)
            continue
        score, sample, column = heapq.heappop(waiting)
        if lists.open(sample):
            taken.add(sample, column, -score)
            lists.take(sample)
        else:
            for entry in _entry(lists, column):
                heapq.heappush(waiting, entry)
    return taken.decision()


def _entry(lists: BestLists, column: int) -> list[tuple[float, int, int]]:
    """What a column waits for; nothing where no sample is left."""
    best = lists.best(column)
    return [] if best is None else [(-best[0], best[1], column)]


def _balanced(table: ScoreTable, lists: BestLists, count: int, mask: Mask, source: str) -> Decision:
    """BIDS (arXiv 2501.12147): standardised columns; the largest lead over the mean of what was taken so far.

    With z the table whose columns have mean 0 and deviation 1 over the samples (a constant column is 0), each step
    takes the largest z_ij - mean of the taken z_.j over free samples i and columns j. score: that lead.
    """
    mean, deviation = moments(table, mask, source)
    scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    columns, taken = table.shape[1], _Taken()
    held = _HeldRows(table, lists, -(-4 * count // columns))
    heads, scores = np.full(columns, -1, dtype=np.int64), np.empty(columns)
    total = np.zeros(columns)
    while len(taken.picks) < count:
        for column in np.flatnonzero(~lists.free[heads] | (heads < 0)).tolist():
            head = lists.best(column)
            if head is None:
                return taken.decision()
            scores[column], heads[column] = head
        lead = (scores - mean) * scale - total / max(1, len(taken.picks))
        best = np.flatnonzero(lead == lead.max())
        column = int(best[heads[best].argmin()])
        sample = int(heads[column])
        if not lists.open(sample):
            continue
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
