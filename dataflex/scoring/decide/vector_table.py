"""The cosines of the pool's vectors with targets as a table that the decision rules read, shared by the ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.scoring.batches import Ids
from dataflex.scoring.decide.neighbours import ROWS, filled
from dataflex.scoring.gather import all_parts, merge
from dataflex.scoring.kept.vectors import Vectors
from dataflex.utils import dist

Floats = NDArray[np.float32]


class VectorTable:
    """A `ScoreTable` of the products of `Vectors` with targets [M, d], made when it is read and held nowhere.

    Each rank makes those of its own shards; to read it is a collective. Every product has the same shape, so that an
    entry has the same bits for any number of ranks.
    """

    def __init__(self, vectors: Vectors, targets: Floats, device: torch.device) -> None:
        self.vectors, self.device = vectors, device
        self._targets = torch.from_numpy(np.ascontiguousarray(targets)).to(device)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.vectors), len(self._targets)

    def blocks(self) -> Iterator[tuple[int, Floats]]:
        size, columns = self.vectors.shard_samples, len(self._targets)
        shards = -(-len(self.vectors) // size)
        for first in range(0, shards, dist.world_size()):
            mine = first // dist.world_size()
            part = torch.zeros(size, columns, device=self.device)
            if mine < len(self.vectors.parts):
                rows = self.vectors.parts[mine][1]
                part[: len(rows)] = self._products(rows)
            for place, block in enumerate(all_parts(part).cpu().numpy()):
                start = (first + place) * size
                if start < len(self.vectors):
                    yield start, block[: len(self.vectors) - start]

    def rows(self, ids: Ids) -> Floats:
        out = np.zeros((len(ids), len(self._targets)), dtype=np.float32)
        mine = self.vectors.held(ids)
        out[mine] = self._products(self.vectors.own_rows(ids[mine])).cpu().numpy()
        return merge(out, self.device)

    def _products(self, rows: Floats) -> torch.Tensor:
        """[b, M]."""
        blocks = [
            (filled(rows[at : at + ROWS], ROWS).to(self.device) @ self._targets.T)[: len(rows) - at]
            for at in range(0, len(rows), ROWS)
        ]
        return torch.cat(blocks) if blocks else self._targets.new_zeros(0, len(self._targets))
