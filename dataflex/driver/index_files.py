"""`select` from the files that embeddings are left in: neighbours of each target, or a probability for each sample.

``top_indices.npy``, integers [M, K]: of each of M targets its K nearest samples, nearest first. ``tsds_probs.npy``,
numbers [N]: how likely each sample is in a draw.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.plan import Ids, generator
from dataflex.core.sampling import weighted_draw
from dataflex.data.sources.info import DatasetInfo
from dataflex.data.sources.rows import places_of
from dataflex.data.weight_file import read_array
from dataflex.driver.scores import Places
from dataflex.scoring.kept.neighbour_files import read_probabilities, read_top_indices
from dataflex.utils.errors import UserError

ENDING = ".npy"
KEY = "select_from"


def read_index_file(path: Path, size: int) -> NDArray[Any]:
    """Neighbours int64 [M, K], ids below ``size``, or probabilities float64 [size] of sum 1. UserError for others."""
    array = read_array(str(path), KEY)
    if array.ndim not in (1, 2):
        raise UserError(
            f"{KEY}: {path}: {array.dtype} {list(array.shape)} is neither neighbours (integers [targets, neighbours]) "
            "nor probabilities (numbers [samples])"
        )
    return read_top_indices(path, size) if array.ndim == 2 else read_probabilities(path, size)


def in_turn(neighbours: Ids, count: int, path: Path) -> Ids:
    """``count`` distinct samples: the targets take turns, each with its nearest that is not taken; int64 [count].

    In each round a target whose neighbour of that rank is taken takes none (arXiv 2503.01807). UserError where fewer
    are named.
    """
    dealt = neighbours.T.reshape(-1)
    first = np.sort(np.unique(dealt, return_index=True)[1])[:count]
    if len(first) < count:
        raise UserError(
            f"select_count: {count:,} samples are asked for, {path} names {len(first):,} different ones; ask for "
            "fewer, or write more neighbours of each target"
        )
    return dealt[first]


def nearness(neighbours: Ids, size: int) -> NDArray[np.float64]:
    """0 for a target's nearest, -1 for a second, and so on, float64 [size]; NaN for a sample that none names."""
    found = np.full(size, np.nan)
    for rank in reversed(range(neighbours.shape[1])):
        found[neighbours[:, rank]] = -float(rank)
    return found


def drawn(probabilities: NDArray[np.float64], count: int, seed: int, replacement: bool = True) -> Ids:
    """``count`` draws, likeliest samples first and each as often as it was drawn, int64 [count].

    UserError without ``replacement`` where fewer than ``count`` have a probability.
    """
    picks = weighted_draw(probabilities, count, replacement=replacement, draw=generator(seed, "select"))
    return picks[np.lexsort((picks, -probabilities[picks]))]


def raw_places(infos: Iterable[DatasetInfo]) -> Places:
    """Every row of the datasets, in their order: what ids mean where nothing else says it."""
    domains: list[int] = []
    files: list[str | None] = []
    rows: list[int] = []
    for domain, info in enumerate(infos):
        for file, row in places_of(info):
            domains.append(domain)
            files.append(file)
            rows.append(row)
    return Places(np.array(domains, dtype=np.int64), np.array(files, dtype=object), np.array(rows, dtype=np.int64))
