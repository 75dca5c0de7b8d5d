"""How long a pass is in which several datasets are interleaved."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=4)
def interleaved(sizes: tuple[int, ...], shares: tuple[float, ...] | None, over: bool, seed: int) -> int:
    """Samples until the first dataset is used up, or with ``over`` all are, as `datasets.interleave_datasets` draws.

    sizes, shares: of the datasets, each > 0 but for what is empty with a share of 0. Without shares they take turns.
    """
    from datasets import Dataset, interleave_datasets

    turns = [Dataset.from_dict({"domain": [number] * size}) for number, size in enumerate(sizes)]
    total = sum(shares or ())
    draws = None if shares is None else [share / total for share in shares]
    rule = "all_exhausted" if over else "first_exhausted"
    return len(interleave_datasets(turns, probabilities=draws, seed=seed, stopping_strategy=rule))
