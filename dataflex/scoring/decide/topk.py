"""The best samples by cosine, streamed over stored features: memory holds a few blocks and the answer, not the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex.scoring.batches import Ids

Floats = NDArray[np.float32]
FEATURES = "features"
BLOCK_BYTES = 32 << 20
MERGE = 1 << 16


class Rows(Protocol):
    """Fixed-width rows in shards: `store.StoreReader` and `store.ShardStore` are such."""

    def __len__(self) -> int: ...

    def read(self, index: int, name: str) -> NDArray[np.float16]: ...


def blocks(rows: Rows, device: torch.device, name: str = FEATURES) -> Iterator[tuple[int, Tensor]]:
    """(position of the first row, rows [b, d] float32 on ``device``) over all shards, in order.

    The next block is read from the disk while the last one is worked on.
    """

    def pieces() -> Iterator[tuple[int, NDArray[np.float16]]]:
        at = 0
        for index in range(len(rows)):
            shard = rows.read(index, name)
            size = max(1, BLOCK_BYTES // max(1, shard.shape[1] * shard.dtype.itemsize))
            for start in range(0, len(shard), size):
                yield at + start, shard[start : start + size]
            at += len(shard)

    def load(piece: tuple[int, NDArray[np.float16]] | None) -> tuple[int, Tensor] | None:
        return None if piece is None else (piece[0], torch.from_numpy(np.array(piece[1])))

    todo = pieces()
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(load, next(todo, None))
        while (block := coming.result()) is not None:
            coming = reader.submit(load, next(todo, None))
            yield block[0], block[1].to(device).float()


def stream_scores(
    rows: Rows, count: int, score: Callable[[Tensor], Tensor], columns: int, device: torch.device
) -> Floats:
    """``score`` ([b, d] float32 to [b, columns]) of every one of ``count`` rows, float32 [count, columns]."""
    out = np.zeros((count, columns), dtype=np.float32)
    for at, block in blocks(rows, device):
        out[at : at + len(block)] = score(block).cpu().numpy()
    return out


def cosine_top_k(rows: Rows, directions: Tensor, count: int, device: torch.device) -> tuple[Ids, Floats]:
    """Positions and scores of the ``count`` rows with the largest cosine to any of ``directions`` [K, d].

    Best first, ties by position; a row of zeros scores 0. Both [min(count, rows)].
    """
    unit = torch.nn.functional.normalize(directions.to(device).float(), dim=1)
    best = _Best(count)
    for at, block in blocks(rows, device):
        length = block.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        scores = ((block @ unit.T).max(dim=1).values / length).cpu().numpy()
        best.add(scores, np.arange(at, at + len(scores), dtype=np.int64))
    best.merge()
    return best.places, best.scores


class _Best:
    """The ``count`` best of what was added. Candidates wait until there are enough of them to be worth a sort."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.scores: Floats = np.empty(0, dtype=np.float32)
        self.places: Ids = np.empty(0, dtype=np.int64)
        self.waiting: list[tuple[Floats, Ids]] = []

    def add(self, scores: Floats, places: Ids) -> None:
        """Later places than those added before: an equal score loses the tie."""
        if self.count and len(self.scores) == self.count:
            able = scores > self.scores[-1]
            scores, places = scores[able], places[able]
        self.waiting.append((scores, places))
        if sum(len(s) for s, _ in self.waiting) >= max(self.count, MERGE):
            self.merge()

    def merge(self) -> None:
        scores = np.concatenate([self.scores, *(s for s, _ in self.waiting)])
        places = np.concatenate([self.places, *(p for _, p in self.waiting)])
        order = np.lexsort((places, -scores))[: self.count]
        self.scores, self.places, self.waiting = scores[order], places[order], []
