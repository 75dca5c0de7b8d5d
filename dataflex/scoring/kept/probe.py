"""What a scoring pass takes, from a few batches of it: for the estimate before a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataflex.scoring.batches import Ids, sample_lengths
from dataflex.scoring.scorer import Scorer
from dataflex.utils import dist

TIMED_CALLS = 3


@dataclass
class Probe:
    """Set in `ScoringPasses.probe`: a pass scores a few batches' worth of samples only, and notes what that took.

    row_bytes: what the pass would keep of a sample. kept: what that is.
    """

    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    row_bytes: int = 4
    kept: str = "scores"


def time_batches(probe: Probe, scorer: Scorer, dataset: Any, call: Callable[[Ids], Any]) -> None:
    """Time ``call`` on about one batch of every rank, its samples taken from all over the pool; a collective.

    The median of a few calls after the first, which allocates and compiles.
    """
    lengths = sample_lengths(dataset, np.arange(len(dataset), dtype=np.int64))
    room = scorer.token_budget * dist.world_size()
    count = int(np.clip(room // max(1, int(lengths.mean())), 1, len(dataset)))
    ids = np.unique(np.linspace(0, len(dataset) - 1, count).astype(np.int64))
    seconds: list[float] = []
    with scorer.keep_moments():
        while len(seconds) <= TIMED_CALLS:
            started = time.monotonic()
            call(ids)
            seconds.append(max(dist.gather_objects(time.monotonic() - started)))
    probe.samples, probe.tokens = len(ids), int(lengths[ids].sum())
    probe.seconds = float(np.median(seconds[1:]))
