"""A vector of each of many samples, divided over the ranks by shards: memory-mapped where they lie on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.scoring.batches import Ids
from dataflex.scoring.gather import merge
from dataflex.utils import dist

Floats = NDArray[np.float32]
SHARD = 4096


class Vectors:
    """Rows float32 [count, width] by sample id, in shards that the ranks take in turn.

    parts: (id of the first row, rows [b, width]) of the shards that this rank holds, ascending.
    """

    def __init__(self, count: int, width: int, shard_samples: int, parts: list[tuple[int, Floats]]) -> None:
        self.count, self.width, self.shard_samples, self.parts = count, width, shard_samples, parts
        self._starts = np.array([start for start, _ in parts], dtype=np.int64)

    @classmethod
    def of_shards(cls, count: int, shard_samples: int, shards: Mapping[int, Floats]) -> Vectors:
        """From every shard by its number, those of other ranks without rows."""
        held = [(index * shard_samples, shards[index]) for index in sorted(shards) if len(shards[index])]
        return cls(count, next(iter(shards.values())).shape[1], shard_samples, held)

    @classmethod
    def of(cls, rows: Floats, shard_samples: int = SHARD) -> Vectors:
        """From an array that every rank has."""
        parts = [(start, rows[start : start + shard_samples]) for start in range(0, len(rows), shard_samples)]
        return cls(len(rows), rows.shape[1], shard_samples, parts[dist.rank() :: dist.world_size()])

    def __len__(self) -> int:
        return self.count

    def blocks(self, size: int) -> Iterator[tuple[int, Floats]]:
        """(id of the first row, at most ``size`` rows) of what this rank holds; each part is cut from its beginning."""
        for start, part in self.parts:
            for at in range(0, len(part), size):
                yield start + at, np.asarray(part[at : at + size])

    def held(self, ids: Ids) -> NDArray[np.bool_]:
        """Which of ``ids`` [...] this rank holds."""
        if not self.parts:
            return np.zeros(ids.shape, dtype=np.bool_)
        part = np.searchsorted(self._starts, ids, side="right") - 1
        ends = np.array([start + len(rows) for start, rows in self.parts])
        return (part >= 0) & (ids < ends[part])

    def own_rows(self, ids: Ids) -> Floats:
        """The rows of ``ids`` [n], all of which this rank holds."""
        out = np.empty((len(ids), self.width), dtype=np.float32)
        part = np.searchsorted(self._starts, ids, side="right") - 1
        for index in np.unique(part):
            mine = np.flatnonzero(part == index)
            start, rows = self.parts[index]
            out[mine] = rows[ids[mine] - start]
        return out

    def rows(self, ids: Ids, device: torch.device) -> Floats:
        """The rows of ``ids`` [n] on every rank, in that order; a collective."""
        out = np.zeros((len(ids), self.width), dtype=np.float32)
        mine = self.held(ids)
        out[mine] = self.own_rows(ids[mine])
        return merge(out, device)
