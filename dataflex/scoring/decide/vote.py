"""ICONS (arXiv 2501.00654): a column votes for its best samples, and the samples with the most votes are taken."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataflex.scoring.batches import Ids
from dataflex.scoring.decide.columns import BestLists, Mask, finite_blocks
from dataflex.scoring.decide.table import ScoreTable

HELD = 1 << 24


def vote(
    table: ScoreTable, count: int, among: Mask, share: float | None, source: str
) -> tuple[Ids, Ids, NDArray[np.float64], NDArray[np.float64]]:
    """Picks [count], the column that each serves (where its percentile rank is best), its votes, and everyone's [N].

    A column votes for the samples at or above the (1 - share) quantile of its scores, which are the ``share`` best and
    those equal to the last of them. Ties by the sum of percentile ranks. Memory holds ``share`` of every column.
    """
    size = int(among.sum())
    share = count / size if share is None else share
    most = 1 + int((size - 1) * share + 1e-9)
    lists = BestLists(table, among, most, source)
    threshold = np.array([scores[most - 1] for scores in lists.scores], dtype=np.float32)
    votes = np.full(table.shape[0], np.nan)
    for ids, block in finite_blocks(table, among, source):
        votes[ids] = (block >= threshold).sum(axis=1)
    last = np.partition(votes[among], size - count)[size - count]
    close = np.flatnonzero(votes >= last)
    ranks, best = _percentile_ranks(table, among, close, source)
    order = np.lexsort((close, -ranks, -votes[close]))[:count]
    return close[order], best[order], votes[close[order]], votes


def _percentile_ranks(table: ScoreTable, among: Mask, ids: Ids, source: str) -> tuple[NDArray[np.int64], Ids]:
    """Of each sample, the sum over columns of twice its mean rank from below, and the column where that is largest."""
    total, best = np.empty(len(ids), dtype=np.int64), np.empty(len(ids), dtype=np.int64)
    step = max(1, HELD // table.shape[1])
    for start in range(0, len(ids), step):
        values = table.rows(ids[start : start + step])
        ranks = np.zeros(values.shape, dtype=np.int64)
        for _, block in finite_blocks(table, among, source):
            for j, column in enumerate(np.sort(block.T, axis=1)):
                for side in ("left", "right"):
                    ranks[:, j] += np.searchsorted(column, values[:, j], side=side)  # type: ignore[call-overload]
        total[start : start + step], best[start : start + step] = ranks.sum(axis=1), ranks.argmax(axis=1)
    return total, best
