"""TSDS (arXiv 2410.11303): how much of the draw each candidate gets, by optimal transport to the targets.

The targets' neighbours get their mass, spread the wider the less ``alpha`` weighs closeness, and near-duplicates share
the mass of one, by a density of the candidates.
"""

from __future__ import annotations

import heapq

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.scoring.batches import Ids
from dataflex.scoring.decide.neighbours import COLUMNS, Neighbours, nearest
from dataflex.scoring.kept.vectors import Vectors
from dataflex.utils import dist

Wide = NDArray[np.float64]
# As the authors have it: no target has more neighbours than a tenth of the pool; and two at least.
SHARE_OF_POOL, LEAST = 10, 2


def at_most(count: int, pool_size: int) -> int:
    """How many of ``count`` neighbours are asked for in a pool of that size."""
    return min(count, max(LEAST, pool_size // SHARE_OF_POOL))


def pool_probabilities(
    vectors: Vectors,
    targets: NDArray[np.float32],
    device: torch.device,
    *,
    max_k: int,
    kde_k: int,
    sigma: float,
    alpha: float,
    c: float,
) -> Wide:
    """The probability of each of the pool's unit vectors for unit targets [M, d], float64 [N]; a collective.

    max_k: neighbours of a target that may get mass, kde_k: that count for a density, both cut by `at_most`.
    """
    size = len(vectors)
    if size == 1:
        return np.ones(1)
    near = nearest(vectors, targets, min(at_most(max_k, size), size), device)
    ids = np.unique(near.ids)
    dense = density(vectors, ids, at_most(kde_k, size), sigma, device)
    found = np.empty(0)
    if dist.is_main():
        found = probabilities(near, dense[np.searchsorted(ids, near.ids)], size, alpha=alpha, c=c)
    return dist.broadcast_object(found)


def density(vectors: Vectors, ids: Ids, most: int, sigma: float, device: torch.device) -> Wide:
    """How many candidates there are where each of ``ids`` [n] is, itself included, float64 [n]; a collective.

    The sum over the ``most`` of ``ids`` nearest to it of max(0, 1 - d^2 / sigma^2), d: the distance; 1 with sigma 0.
    """
    if sigma == 0:
        return np.ones(len(ids))
    among = np.zeros(len(vectors), dtype=np.bool_)
    among[ids] = True
    found = np.empty(len(ids))
    for at in range(0, len(ids), COLUMNS):
        rows = vectors.rows(ids[at : at + COLUMNS], device)
        apart = nearest(vectors, rows, min(most, len(ids)), device, among, again=False).distances
        found[at : at + COLUMNS] = np.maximum(0.0, 1 - np.square(apart / sigma)).sum(axis=1)
    return np.maximum(found, 1.0)


def probabilities(near: Neighbours, densities: Wide, size: int, *, alpha: float, c: float) -> Wide:
    """The probability of each of ``size`` candidates, float64 [size]; sums to 1.

    near: of M targets, K >= 2 neighbours each. densities: of the neighbours, [M, K], at least 1. A target's mass 1 / M
    goes to its nearest, each of which takes at most 1 / (M s density); s grows until what further mass costs outweighs
    the closeness: alpha / c x the sum over targets of the cost of going on, at (1 - alpha) x M.
    """
    last, s = _reach(near.distances, densities, alpha, c)
    found = np.zeros(size)
    share = 1.0 / len(near.ids)
    for ids, dense, reached in zip(near.ids, densities, last, strict=True):
        so_far = np.minimum(np.cumsum(share / (s * dense[: reached + 1])), share)
        mass = np.diff(so_far, prepend=0.0, append=share)
        found[ids[: reached + 2]] += mass
    return found / found.sum()


def _reach(distances: Wide, densities: Wide, alpha: float, c: float) -> tuple[list[int], float]:
    """The last neighbour of each target that takes all it may, and s: the authors' algorithm, by rising s."""
    targets, most = distances.shape
    inverse = 1.0 / densities
    waiting = [(float(inverse[j, 0]), 0, j) for j in range(targets)]
    heapq.heapify(waiting)
    carried = (distances[:, 0] * inverse[:, 0]).tolist()
    costs, total = [0.0] * targets, 0.0
    last, s = [0] * targets, 1.0
    while waiting:
        s, k, j = heapq.heappop(waiting)
        total -= costs[j]
        costs[j] = float(distances[j, k + 1]) * s - carried[j]
        total += costs[j]
        if alpha / c * total >= (1 - alpha) * targets:
            break
        last[j] = k
        if k < most - 2:
            more = float(inverse[j, k + 1])
            heapq.heappush(waiting, (s + more, k + 1, j))
            carried[j] += float(distances[j, k + 1]) * more
    return last, s
