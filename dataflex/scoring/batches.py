"""Which samples are scored together: length buckets under a token budget, dealt to ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


MOST_SAMPLES = 1024


def bucket(ids: Ids, lengths: NDArray[Any], token_budget: int, max_samples: int = MOST_SAMPLES) -> list[Ids]:
    """Batches of similar length, longest first: samples x longest <= token_budget; at most ``max_samples`` samples.

    Where the longest sample alone is more than the budget, all batches may be as large as that one has to be.
    ids: int64 [n]; lengths: tokens of each of them, int [n]. The same for every world size.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    batches: list[Ids] = []
    token_budget = max(token_budget, int(lengths.max(initial=1)))
    at = 0
    while at < len(order):
        longest = max(1, int(lengths[order[at]]))
        size = int(np.clip(token_budget // longest, 1, max_samples))
        batches.append(ids[order[at : at + size]])
        at += size
    return batches


def deal(batches: list[Ids], rank: int, world_size: int) -> Iterator[tuple[Ids, bool]]:
    """This rank's batches, each with whether its result counts.

    Every rank gets the same number of them: a short rank repeats its last one (or the first of all) and drops
    the result, because under ZeRO-3 a rank that makes fewer calls hangs the others.
    """
    assert batches, "nothing to score"
    for turn in range(-(-len(batches) // world_size)):
        mine = turn * world_size + rank
        yield (batches[mine], True) if mine < len(batches) else (batches[-1], False)


def sample_lengths(dataset: Any, ids: Ids) -> NDArray[np.int64]:
    """Tokens of each sample, int64 [n]: from the dataset's ``lengths``, else by reading it."""
    known = getattr(dataset, "lengths", None)
    if known is not None:
        return np.asarray(known)[ids].astype(np.int64)
    return np.array([len(dataset[int(i)]["input_ids"]) for i in ids], dtype=np.int64)
