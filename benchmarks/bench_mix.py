"""What a mixing decision costs at 100 domains and 10 million samples, against permuting each domain anew.

    python benchmarks/bench_mix.py [--domains 100] [--samples 10000000] [--rounds 9] [--csv FILE] [--smoke]

A decision is odm's new proportions and the plan of a phase: domain counts, sample ids without replacement,
probabilities, shuffled. The baseline makes the plan from a permutation of every domain that is drawn from, as a loader
that shuffles whole datasets does. Before timing, both plans are checked: counts, domains, no repeats.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_step import write_csv
from measure import machine

from dataflex.core.plan import epoch_stream, generator
from dataflex.train.mixer.mixture import MixtureManager, rounded_counts
from dataflex.train.mixer.odm_mixer import OdmMixer

PHASES = {"1 step of 64": 64, "100 steps of 64": 6400, "1,000 steps of 256": 256_000}


def permuting(domain_ids: Any, domains: int, shares: Any, count: int, phase: int) -> Any:
    """Sample ids [count] of a phase, from permutations of whole domains."""
    counts, _ = rounded_counts(shares, count, np.zeros(domains))
    sizes = np.bincount(domain_ids, minlength=domains)
    starts = np.cumsum(sizes) - sizes
    parts = [starts[d] + epoch_stream(int(sizes[d]), 1, f"domain {d}", 0, int(counts[d])) for d in range(domains)]
    return np.concatenate(parts)[generator(1, "order", phase).permutation(count)]


def peak_mib(call: Callable[[], Any]) -> float:
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def measure(domains: int, samples: int, rounds: int) -> list[dict[str, Any]]:
    domain_ids = np.repeat(np.arange(domains, dtype=np.int32), samples // domains)
    shares = np.full(domains, 1 / domains)
    manager = MixtureManager(domain_ids, [f"d{i}" for i in range(domains)], shares, 1)
    mixer = OdmMixer(manager)
    mixer.learn(np.linspace(2.0, 4.0, domains), np.ones(domains))
    mixer.steps = 10_000  # late enough for proportions that differ
    shares = mixer.mix(None, 0)
    rows = []
    for name, count in PHASES.items():
        count = min(count, samples // 20)
        variants = {
            "dataflex": lambda phase, n=count: manager.draw(mixer.mix(None, phase), n, phase).sample_ids,
            "permute whole domains": lambda phase, n=count: permuting(
                domain_ids, domains, mixer.mix(None, phase), n, phase
            ),
        }
        for plan in (variant(0) for variant in variants.values()):
            assert len(np.unique(plan)) == count
            assert np.abs(np.bincount(domain_ids[plan], minlength=domains) - shares * count).max() < 1 + 1e-6
        taken: dict[str, list[float]] = {variant: [] for variant in variants}
        for turn in range(1, rounds + 1):
            for variant, make in variants.items():
                started = time.perf_counter()
                make(turn)
                taken[variant].append(1e3 * (time.perf_counter() - started))
        for variant, times in taken.items():
            rows.append(
                {
                    "phase": name,
                    "implementation": variant,
                    "domains": domains,
                    "pool": samples,
                    "median_ms": round(statistics.median(times), 3),
                    "min_ms": round(min(times), 3),
                    "peak_mib": round(peak_mib(lambda make=variants[variant]: make(rounds + 1)), 2),
                }
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--domains", type=int, default=100)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--csv", default="")
    parser.add_argument("--smoke", action="store_true", help="a small pool and two rounds, to see that it runs")
    arguments = parser.parse_args()
    sizes = (10, 10_000, 2) if arguments.smoke else (arguments.domains, arguments.samples, arguments.rounds)
    rows = measure(*sizes)
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    if arguments.csv:
        facts = machine(torch.device("cpu"))
        write_csv(Path(arguments.csv), [row | facts | {"numpy": np.__version__} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
