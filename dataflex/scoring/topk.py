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


def stream_scores(rows: Rows, count: int, score: Callable[[Tensor], Tensor], device: torch.device) -> Floats:
    """``score`` ([b, d] float32 to [b]) of every one of ``count`` rows, float32 [count]."""
    out = np.zeros(count, dtype=np.float32)
    for at, block in blocks(rows, device):
        out[at : at + len(block)] = score(block).cpu().numpy()
    return out


def cosine_top_k(rows: Rows, directions: Tensor, count: int, device: torch.device) -> tuple[Ids, Floats]:
    """Positions and scores of the ``count`` rows with the largest cosine to any of ``directions`` [K, d].

    Best first, ties by position; a row of zeros scores 0. Both [min(count, rows)].
    """
    unit = torch.nn.functional.normalize(directions.to(device).float(), dim=1)
    best = np.empty(0, dtype=np.float32)
    places = np.empty(0, dtype=np.int64)
    for at, block in blocks(rows, device):
        length = block.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        scores = ((block @ unit.T).max(dim=1).values / length).cpu().numpy()
        mine = np.arange(at, at + len(scores), dtype=np.int64)
        if len(best) == count and count:
            able = scores > best[-1]  # an equal one comes later, so it loses the tie
            scores, mine = scores[able], mine[able]
        best, places = np.concatenate([best, scores]), np.concatenate([places, mine])
        order = np.lexsort((places, -best))[:count]
        best, places = best[order], places[order]
    return places, best
