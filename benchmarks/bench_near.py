"""What a decision by nearest neighbours costs once the embeddings are there: time and memory over growing pools.

    python benchmarks/bench_near.py [--rows 100000] [--width 576] [--targets 500] [--csv FILE] [--smoke]

Random unit embeddings, float32, lie in a file that is memory-mapped, a quarter, a half and all of the rows; each of the
targets is a row with some noise, so that its nearest neighbour is known, and is checked. 5% of the rows are picked.
Memory is the process's own above its level before (without the file's pages, which the kernel may drop at any time).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_topk import Peak
from less_setup import show, write_csv
from measure import machine

from dataflex.scoring.decide.rules import decide
from dataflex.scoring.decide.vector_table import VectorTable
from dataflex.scoring.kept.vectors import Vectors

SHARE, SEED, BLOCK = 0.05, 0, 8192


def write_rows(path: Path, rows: int, width: int) -> None:
    """Random directions float32 [rows, width] as an .npy file, block by block."""
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, width))
    for start in range(0, rows, BLOCK):
        size = min(BLOCK, rows - start)
        block = np.random.default_rng([SEED, start]).standard_normal((size, width), np.float32)
        out[start : start + size] = block / np.linalg.norm(block, axis=1, keepdims=True)
    out.flush()


def make_targets(rows: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy copies of ``count`` rows from all over, unit [count, width], and which rows they are copies of."""
    sources = np.linspace(0, len(rows) - 1, count).astype(np.int64)
    noise = np.random.default_rng([SEED, 1]).standard_normal((count, rows.shape[1]), np.float32)
    found = rows[sources] + noise * np.float32(0.3 / rows.shape[1] ** 0.5)
    return found / np.linalg.norm(found, axis=1, keepdims=True), sources


def measure(rows: Any, targets: int, rounds: int) -> dict[str, Any]:
    """Time and memory of a decision over ``rows`` [n, width]; the first picks are checked."""
    wanted, sources = make_targets(rows, targets)
    count = max(targets, round(SHARE * len(rows)))
    taken = []
    with Peak() as peak:
        for _ in range(rounds):
            started = time.perf_counter()
            decision = decide(VectorTable(Vectors.of(rows), wanted, torch.device("cpu")), count, "round_robin")
            taken.append(time.perf_counter() - started)
    assert (decision.picks[:targets] == sources).all(), "the nearest neighbours do not come first"
    assert len(np.unique(decision.picks)) == count
    return {
        "rows": len(rows),
        "width": rows.shape[1],
        "targets": targets,
        "picks": count,
        "seconds": round(statistics.median(taken), 3),
        "rounds": rounds,
        "peak_mib": round(peak.most, 1),
        **machine(torch.device("cpu")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--targets", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--smoke", action="store_true", help="few rows: shows that everything runs")
    asked = parser.parse_args()
    if asked.smoke:
        asked.rows, asked.width, asked.targets, asked.rounds = 2000, 16, 20, 1
    found = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.npy")
        write_rows(file, asked.rows, asked.width)
        rows = np.load(file, mmap_mode="r")
        for part in (4, 2, 1):
            found.append(measure(rows[: asked.rows // part], asked.targets, asked.rounds))
    show(found, list(found[0])[:7])
    if asked.csv is not None:
        write_csv(asked.csv, found)


if __name__ == "__main__":
    main()
