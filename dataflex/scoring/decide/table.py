"""Score tables: a number for each of N samples and M columns, read block by block.

A column is what is asked about: a subtask of the target, or a single sample of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dataflex.scoring.batches import Ids
from dataflex.scoring.decide.topk import Rows
from dataflex.utils import dist

Floats = NDArray[np.float32]
BLOCK_ROWS = 4096


class ScoreTable(Protocol):
    """float32 [N, M], sample ids by columns; a row has the same bits whichever way it is read."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def blocks(self) -> Iterator[tuple[int, Floats]]:
        """(id of the first row, float32 [b, M]) over all rows, in order."""

    def rows(self, ids: Ids) -> Floats:
        """The rows of ``ids`` [k], in that order: float32 [k, M]."""


def whole(table: ScoreTable) -> Floats:
    """All of a table, float32 [N, M]."""
    return np.concatenate([block for _, block in table.blocks()])


def on_main(table: ScoreTable, of: Callable[[Floats], Floats] = lambda block: block) -> Floats | None:
    """What ``of`` makes of the blocks of a table, [N, ...] on rank 0 alone; every rank that has the table reads it."""
    parts = [of(block) for _, block in table.blocks() if dist.is_main()]
    return np.concatenate(parts) if parts else None


class ArrayTable:
    """A table in memory. array: float32 [N, M]."""

    def __init__(self, array: Floats, block_rows: int = 16 * BLOCK_ROWS) -> None:
        assert array.ndim == 2 and array.shape[1] > 0
        self.array, self.block_rows = array, block_rows

    @property
    def shape(self) -> tuple[int, int]:
        return self.array.shape[0], self.array.shape[1]

    def blocks(self) -> Iterator[tuple[int, Floats]]:
        for start in range(0, len(self.array), self.block_rows):
            yield start, self.array[start : start + self.block_rows]

    def rows(self, ids: Ids) -> Floats:
        return self.array[ids]


class ShardTable:
    """The rows float32 [b, M] that lie in the shards of a store under ``name``, memory-mapped."""

    def __init__(self, shards: Rows, name: str) -> None:
        self.shards, self.name = shards, name
        parts = [shards.read(index, name) for index in range(len(shards))]
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.columns = int(parts[0].shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.starts[-1]), self.columns

    def blocks(self) -> Iterator[tuple[int, Floats]]:
        for index, start in enumerate(self.starts[:-1]):
            yield int(start), np.asarray(self.shards.read(index, self.name))

    def rows(self, ids: Ids) -> Floats:
        out = np.empty((len(ids), self.columns), dtype=np.float32)
        shard = np.searchsorted(self.starts, ids, side="right") - 1
        for index in np.unique(shard):
            mine = np.flatnonzero(shard == index)
            out[mine] = self.shards.read(int(index), self.name)[ids[mine] - self.starts[index]]
        return out
