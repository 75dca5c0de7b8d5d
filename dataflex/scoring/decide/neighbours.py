"""Nearest neighbours by cosine, exactly: matrix products of blocks, over the ranks' shares of the candidates.

Every product has the same shape, filled up with zeros, so that an entry has the same bits for any number of ranks.
What the products find is measured again in float64, so that equal vectors are equally far, and ties go by id.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex.scoring.batches import Ids
from dataflex.scoring.decide.approximate import nearly_nearest
from dataflex.scoring.gather import all_parts
from dataflex.scoring.kept.vectors import Vectors
from dataflex.utils.logging import logger

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
ROWS, COLUMNS = 4096, 512
SLACK = 8
MOST_PRODUCTS = 10**13
MEASURED = 1 << 22
NO_ID = 2**31 - 1
# Of a vector of zeros, which has no direction: as far as one at a right angle.
FAR = 2.0**0.5


class Neighbours(NamedTuple):
    """Of each of M targets its K nearest, nearest first: ids int64 [M, K], Euclidean distance of the unit vectors."""

    ids: Ids
    distances: NDArray[np.float64]


def nearest(
    vectors: Vectors,
    targets: Floats,
    count: int,
    device: torch.device,
    among: Mask | None = None,
    *,
    again: bool = True,
) -> Neighbours:
    """The ``count`` nearest of unit ``vectors`` to each of unit ``targets`` [M, d]; a collective.

    Ties go to the lower id. A vector of zeros has the cosine 0 to all. among: bool [N], which candidates there are, at
    least ``count``. again: measure distances again in float64; else they are float32's, whose error is 3e-4 at 0.
    Above `MOST_PRODUCTS` multiplications faiss is asked instead, where it is installed: it looks at the candidates of
    the nearest cells alone, so that it may miss some. Memory: M x count numbers, and a few blocks.
    """
    assert 0 < count <= (len(vectors) if among is None else int(among.sum()))
    if len(vectors) * targets.size > MOST_PRODUCTS and _asks_faiss():
        ids, cosines = nearly_nearest(vectors, targets, count + SLACK, device, among, NO_ID)
    else:
        ids, cosines = _best_products(vectors, targets, count + SLACK, device, among)
    distances = np.sqrt(np.maximum(2 - 2 * cosines.astype(np.float64), 0))
    if again:
        distances = _measured(vectors, targets, ids, device)
    distances[ids == NO_ID] = np.inf
    return _merged(ids, distances, count, device)


@cache
def _asks_faiss() -> bool:
    """Said once."""
    found = find_spec("faiss") is not None
    how = "faiss looks at the nearest cells alone, and may miss some" if found else "found exactly, which takes long"
    hint = "" if found else "; pip install 'dataflex[cluster]' has faiss look at a part"
    logger.info(f"neighbours: more than {MOST_PRODUCTS:.0e} multiplications: {how}{hint}")
    return found


def _best_products(
    vectors: Vectors, targets: Floats, most: int, device: torch.device, among: Mask | None
) -> tuple[Ids, Floats]:
    """Of what this rank holds, ids and cosines of the ``most`` largest products with each target [M, most].

    Where there are fewer, the rest are `NO_ID`.
    """
    width = min(COLUMNS, 1 << max(3, (len(targets) - 1).bit_length()))
    starts = range(0, len(targets), width)
    asked = [filled(targets[at : at + width], width).to(device) for at in starts]
    nobody = _keys(torch.full((width, most), -2.0, device=device), torch.full((most,), NO_ID, device=device))
    best = [nobody] * len(starts)
    for start, rows in vectors.blocks(ROWS):
        block = filled(rows, ROWS).to(device)
        ids = torch.arange(start, start + ROWS, device=device)
        out = ids >= start + len(rows)
        if among is not None:
            out[: len(rows)] |= ~torch.from_numpy(among[start : start + len(rows)]).to(device)
        for place, columns in enumerate(asked):
            keys = torch.where(out, nobody[0, 0], _keys(columns @ block.T, ids))
            best[place] = torch.cat([best[place], keys], dim=1).topk(most, dim=1).values
    return _of_keys(torch.cat(best)[: len(targets)])


def filled(rows: Floats, size: int) -> Tensor:
    """``rows`` and rows of zeros below, [size, d] float32."""
    out = torch.zeros(size, rows.shape[1])
    out.numpy()[: len(rows)] = rows  # which may be of a file, and not writable
    return out


def _keys(scores: Tensor, ids: Tensor) -> Tensor:
    """Numbers int64 [M, b] that are larger for a larger score, and among equal ones for a lower id.

    scores: float32 [M, b]; ids: int64 [b], at most `NO_ID`.
    """
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0: no score is -0
    return torch.where(bits < 0, bits ^ NO_ID, bits) * (NO_ID + 1) * 2 + (NO_ID - ids)


def _of_keys(keys: Tensor) -> tuple[Ids, Floats]:
    """Ids and scores of `_keys`."""
    high, low = keys >> 32, keys & (2**32 - 1)
    bits = torch.where(high < 0, high ^ NO_ID, high).to(torch.int32)
    return (NO_ID - low).cpu().numpy(), bits.view(torch.float32).cpu().numpy()


def _measured(vectors: Vectors, targets: Floats, ids: Ids, device: torch.device) -> NDArray[np.float64]:
    """Distances of the unit vectors of ``ids`` [M, K], which this rank holds, to the targets, in float64."""
    wanted = _unit(torch.from_numpy(targets).to(device))
    out = np.zeros(ids.size)
    places = np.flatnonzero(ids != NO_ID)
    step = max(1, MEASURED // max(1, vectors.width))
    for at in range(0, len(places), step):
        mine = places[at : at + step]
        rows = _unit(torch.from_numpy(vectors.own_rows(ids.reshape(-1)[mine])).to(device))
        to = wanted[torch.from_numpy(mine // ids.shape[1]).to(device)]
        apart = (rows - to).square().sum(1).sqrt()
        directed = rows.any(1) & to.any(1)
        out[mine] = torch.where(directed, apart, FAR).cpu().numpy()
    return out.reshape(ids.shape)


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=1)


def _merged(ids: Ids, distances: NDArray[np.float64], count: int, device: torch.device) -> Neighbours:
    """The ``count`` nearest of what all ranks found, on every rank."""
    every = torch.cat(list(all_parts(torch.from_numpy(ids).to(device))), dim=1).cpu().numpy()
    apart = torch.cat(list(all_parts(torch.from_numpy(distances).to(device))), dim=1).cpu().numpy()
    order = np.lexsort((every, apart), axis=1)[:, :count]
    return Neighbours(np.take_along_axis(every, order, 1), np.take_along_axis(apart, order, 1))
