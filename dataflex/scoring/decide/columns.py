"""What the rules need of a table's columns, streamed: the best samples of each, and mean and deviation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dataflex.scoring.batches import Ids
from dataflex.scoring.decide.table import Floats, ScoreTable
from dataflex.utils.errors import UserError

Mask = NDArray[np.bool_]
Wide = NDArray[np.float64]
LEAST = 1 << 20
ASKED_AHEAD = 512


class Gate(Protocol):
    """Says which samples may still be taken, by what was taken; one that may not be never may."""

    def admits(self, sample: int, coming: Callable[[], Ids]) -> bool:
        """Whether ``sample`` may be taken. coming: samples that will be asked about next."""

    def took(self, sample: int) -> None:
        """``sample``, which was admitted just now, is taken."""


def finite_blocks(table: ScoreTable, among: Mask, source: str) -> Iterator[tuple[Ids, Floats]]:
    """(ids [b], scores float32 [b, M]) of the samples of a mask [N], in order.

    UserError, in the name of ``source``, where one of their scores is not finite.
    """
    for start, block in table.blocks():
        places = np.flatnonzero(among[start : start + len(block)])
        part = block if len(places) == len(block) else block[places]
        wrong = ~np.isfinite(part).all(axis=1)
        if wrong.any():
            bad = (places[wrong] + start)[:16].tolist()
            raise UserError(f"{source}: scores of sample ids {bad} are not finite")
        if len(places):
            yield places + start, part


def moments(table: ScoreTable, among: Mask, source: str) -> tuple[Wide, Wide]:
    """Mean and standard deviation (of the samples as the population) of each column, float64 [M] each."""
    count, mean, squares = 0, np.zeros(table.shape[1]), np.zeros(table.shape[1])
    for ids, block in finite_blocks(table, among, source):
        part = block.astype(np.float64)
        own = part.sum(axis=0) / len(ids)
        apart, whole = own - mean, count + len(ids)
        squares += np.square(part - own).sum(axis=0) + np.square(apart) * (count * len(ids) / whole)
        mean, count = mean + apart * (len(ids) / whole), whole
    return mean, np.sqrt(squares / count)


class BestLists:
    """Of each column the best samples that are not taken yet; ties by sample id.

    Where a list runs out, all are made anew in another pass, without what was taken by then. length: of each list.
    gate: asked of each sample that would be taken.
    """

    def __init__(self, table: ScoreTable, among: Mask, length: int, source: str, gate: Gate | None = None) -> None:
        assert length > 0
        self.gate = gate
        self.table, self.free, self.source, self.length = table, among.copy(), source, length
        self.left = int(among.sum())
        self._fill()

    @classmethod
    def to_take(cls, table: ScoreTable, among: Mask, count: int, source: str, gate: Gate | None = None) -> BestLists:
        """Lists of 4 x count / M, from which ``count`` samples shall be taken; longer where the columns are few."""
        columns = table.shape[1]
        return cls(table, among, max(-(-4 * count // columns), LEAST // columns), source, gate)

    def take(self, sample: int) -> None:
        """No list has ``sample`` any more."""
        if self.gate is not None:
            self.gate.took(sample)
        self._drop(sample)

    def open(self, sample: int) -> bool:
        """Whether ``sample`` may be taken as things stand."""
        ahead = max(1, ASKED_AHEAD // len(self.ids))
        if self.free[sample] and self.gate is not None and not self.gate.admits(sample, lambda: self.ahead(ahead)):
            self._drop(sample)
        return bool(self.free[sample])

    def _drop(self, sample: int) -> None:
        self.free[sample] = False
        self.left -= 1

    def best(self, column: int) -> tuple[float, int] | None:
        """Score and id of the column's best sample that may be taken; None where no sample is left."""
        while self.left > 0:
            ids, at = self.ids[column], self.at
            while at[column] < len(ids) and not self.open(int(ids[at[column]])):
                at[column] += 1
            if at[column] < len(ids):
                return float(self.scores[column][at[column]]), int(ids[at[column]])
            if self.left > 0:
                self._fill()
        return None

    def ahead(self, count: int) -> Ids:
        """The samples in the next ``count`` places of every list that are not taken, int64, ascending."""
        ids = np.unique(np.concatenate([ids[at : at + count] for ids, at in zip(self.ids, self.at, strict=True)]))
        return ids[self.free[ids]]

    def _fill(self) -> None:
        columns, most = self.table.shape[1], min(self.length, self.left)
        self.scores = [np.empty(0, dtype=np.float32)] * columns
        self.ids = [np.empty(0, dtype=np.int64)] * columns
        for ids, block in finite_blocks(self.table, self.free, self.source):
            for j, column in enumerate(np.ascontiguousarray(block.T)):
                self.scores[j], self.ids[j] = _merged(self.scores[j], self.ids[j], column, ids, most)
        self.at = [0] * columns


def _merged(scores: Floats, ids: Ids, more: Floats, more_ids: Ids, most: int) -> tuple[Floats, Ids]:
    """The ``most`` best of a sorted list and of later samples, sorted."""
    if len(scores) == most:
        able = more > scores[-1]
    elif len(more) > most:
        able = more >= np.partition(more, len(more) - most)[len(more) - most]
    else:
        able = np.ones(len(more), dtype=np.bool_)
    if not able.any():
        return scores, ids
    scores, ids = np.concatenate([scores, more[able]]), np.concatenate([ids, more_ids[able]])
    order = np.argsort(-scores, kind="stable")[:most]
    return scores[order], ids[order]
