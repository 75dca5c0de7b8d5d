"""The native ops against what a user would run instead, on this machine's GPU, else on its CPU.

    python benchmarks/bench_ops.py [--csv FILE] [--only loss|project] [--device cpu|cuda] [--rounds 15] [--smoke]

Every result is compared with a float64 reference before it is timed. All variants of an op live in one process and
take turns; figures are medians with quartiles. ``floor_ms`` is the time that the bytes or operations that must be
moved or done take at the bandwidth or rate measured at the start, ``of_floor`` the share of it that is reached,
``speedup`` the median ratio to the variant named in ``against``. Rows of libraries that are not installed are left
out. --smoke shows that everything runs, with tiny shapes; its times mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from measure import Bench, Row, machine

from dataflex.ops import implementations

FAMILIES = ("loss", "project")
SHOWN = ("op", "shape", "implementation", "median_ms", "speedup", "against", "of_floor", "floor", "peak_mib", "error")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--only", choices=FAMILIES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--smoke", action="store_true")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    bench = Bench(torch.device(asked.device), asked.rounds, asked.smoke)
    facts = machine(bench.device)
    bandwidth = bench.bandwidth()
    facts |= {f"{name}_gb_per_s": round(rate / 1e6, 1) for name, rate in bandwidth.items()}
    for name, value in {**facts, **implementations()}.items():
        print(f"{name}: {value}")
    with written(asked.csv) as write:
        for family in FAMILIES if asked.only is None else (asked.only,):
            for row in importlib.import_module(f"ops_{family}").rows(bench, bandwidth):
                write(row | facts)
                print("  ".join(f"{name}={row[name]}" for name in SHOWN), flush=True)


@contextmanager
def written(path: Path | None) -> Iterator[Callable[[Row], None]]:
    """Writes each row as it comes: a run that is cut off leaves those that it has measured."""
    if path is None:
        yield lambda row: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writers: list[Any] = []

        def write(row: Row) -> None:
            if not writers:
                writers.append(csv.DictWriter(file, list(row)))
                writers[0].writeheader()
            writers[0].writerow(row)
            file.flush()

        yield write


if __name__ == "__main__":
    main()
