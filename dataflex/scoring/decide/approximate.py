"""Neighbours of very many candidates by faiss: the candidates of the cells nearest to a target are looked at."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.scoring.batches import Ids
from dataflex.scoring.gather import all_parts
from dataflex.scoring.kept.vectors import Vectors
from dataflex.utils import dist

SEED = 0
LEARNT_FROM, LOOKED_AT = 64, 32
"""Candidates that a cell's centre is learnt from, and cells that are looked at to begin with."""


def nearly_nearest(
    vectors: Vectors,
    targets: NDArray[np.float32],
    most: int,
    device: torch.device,
    among: NDArray[np.bool_] | None,
    no_id: int,
) -> tuple[Ids, NDArray[np.float32]]:
    """Of what this rank holds, ids and cosines of up to ``most`` near each target [M, most]; else ``no_id``.

    The square root of the number of candidates is the number of cells. They are the same on every rank, so that all
    ranks together look at the same candidates, however many ranks there are. More cells are looked at where they hold
    too few candidates.
    """
    import faiss

    centres = _centres(vectors, device)
    flat = faiss.IndexFlatIP(vectors.width)
    flat.add(centres)
    index = faiss.IndexIVFFlat(flat, vectors.width, len(centres), faiss.METRIC_INNER_PRODUCT)
    index.train(centres)
    for start, rows in vectors.blocks(1 << 16):
        ids = np.arange(start, start + len(rows))
        kept = slice(None) if among is None else among[ids]
        index.add_with_ids(np.ascontiguousarray(rows[kept]), ids[kept])
    there = len(vectors) if among is None else int(among.sum())
    index.nprobe = min(LOOKED_AT, len(centres))
    while True:
        cosines, found = index.search(np.ascontiguousarray(targets), most)
        together = all_parts(torch.from_numpy((found >= 0).sum(1)).to(device)).sum(0)
        if int(together.min()) >= min(most, there) or index.nprobe == len(centres):
            return np.where(found >= 0, found, no_id), cosines
        index.nprobe = min(4 * index.nprobe, len(centres))


def _centres(vectors: Vectors, device: torch.device) -> NDArray[np.float32]:
    """Of the cells, learnt by rank 0 from candidates all over the pool; a collective."""
    import faiss

    cells = max(1, int(len(vectors) ** 0.5))
    some = np.unique(np.linspace(0, len(vectors) - 1, min(len(vectors), LEARNT_FROM * cells)).astype(np.int64))
    rows = vectors.rows(some, device)
    if dist.is_main():
        learner = faiss.Kmeans(vectors.width, cells, seed=SEED, spherical=True, min_points_per_centroid=1)
        learner.train(rows)
        assert learner.centroids is not None
        rows = learner.centroids
    centres: NDArray[np.float32] = dist.broadcast_object(rows)
    return centres
