"""Which samples each way to choose takes: files of sample ids, made once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.plan import generator
from downstream import processes
from downstream.suites import FULL_POOL, OWN_DOMAIN, RANDOM, SAME_LENGTHS, SELECTORS, Suite, selecting

Ids = NDArray[np.int64]
LENGTH_BINS = 20


def random_picks(ids: Ids, count: int, seed: int) -> Ids:
    """``count`` of ``ids`` [n]; those of a smaller count are among those of a larger one."""
    return generator(seed, "downstream").permutation(ids)[:count]


def same_lengths(lengths: NDArray[Any], like: Ids, seed: int) -> Ids:
    """Random samples with the lengths of ``like``: as many in each of `LENGTH_BINS` bins of equally many samples.

    lengths: [pool]. like: sample ids [k]. Without repeats, but where a bin holds fewer samples than are asked of it.
    """
    order = np.argsort(lengths, kind="stable")
    bins = np.empty(len(lengths), dtype=np.int64)
    bins[order] = np.arange(len(lengths)) * LENGTH_BINS // len(lengths)
    draw, found = generator(seed, "downstream lengths"), []
    for number, count in enumerate(np.bincount(bins[like], minlength=LENGTH_BINS)):
        there = np.flatnonzero(bins == number)
        found.append(draw.choice(there, count, replace=bool(count > len(there))))
    return np.concatenate(found)


@dataclass(frozen=True)
class Picker:
    """The picks of a suite, in files below ``folder``. pool: as a run reads it; data: the suite's dataset_dir."""

    suite: Suite
    pool: Any
    data: Path
    folder: Path
    threads: int

    def counts(self) -> list[int]:
        """Samples of each budget, the largest first: its selection's pass is the one that is timed."""
        return sorted({self.suite.count(budget, len(self.pool)) for budget in self.suite.budgets}, reverse=True)

    def answer(self, method: str, seed: int, rounds: int = 1, anew: bool = False) -> dict[str, Any]:
        """What `one_selection` found for a selector; from its file where the same was asked before, or timed."""
        seed = 1 if self.suite.one_selection else seed
        name = f"{named(method)}_{seed}"
        config = selecting(self.suite, self.data, method, seed, self.counts()[0])
        file = self.folder / f"{name}.json"
        job = {
            "config": config | {"output_dir": str((self.folder / name).resolve())},
            "counts": self.counts(),
            "rounds": rounds,
            "answer": str(file.resolve()),
        }
        known = json.loads(file.read_text(encoding="utf-8"))["job"] if file.exists() else {}
        if anew or known | {"rounds": rounds} != job:
            self.folder.mkdir(parents=True, exist_ok=True)
            asked = self.folder / f"{name}.job.json"
            asked.write_text(json.dumps(job), encoding="utf-8")
            processes.select(asked, self.threads)
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def picks(self, method: str, budget: float, seed: int) -> Ids:
        """Sample ids of a method, int64 [count]; of the full pool as many as fill whole batches."""
        count = self.suite.count(budget, len(self.pool))
        if method in SELECTORS:
            return np.array(self.answer(method, seed)["picks"][str(count)], dtype=np.int64)
        if method in SAME_LENGTHS:
            return same_lengths(self.pool.lengths, self.picks(SAME_LENGTHS[method], budget, seed), seed)
        everything = np.arange(len(self.pool))
        if method == OWN_DOMAIN:
            own = self.pool.domain_names.index(self.suite.datasets[-1])
            return random_picks(everything[self.pool.domain_ids == own], count, seed)
        assert method in (RANDOM, FULL_POOL), method
        whole = len(self.pool) // self.suite.batch * self.suite.batch
        return random_picks(everything, whole if method == FULL_POOL else count, seed)


def named(method: str) -> str:
    """A method's name for a file."""
    return "".join(mark if mark.isalnum() else "_" for mark in method)
