"""Streaming cosine top-k over stored features, against the time that reading them and the product alone need.

    python benchmarks/bench_topk.py [--rows 1000000] [--width 1024] [--folder F] [--csv out.csv] [--smoke]

The store (rows x width fp16, written once, about 2 GB by default) is scored with 4 directions and the best 5% are kept.
The answer is checked first: on a part of the rows against a float64 sort, on all of them for planted rows. Memory is
the process's own above its level before (without the file pages that the kernel may drop at any time), sampled while
the pass runs, for a quarter, a half and all of the rows. Floors: reading every shard's bytes (the files lie in the page
cache after the first pass unless they are larger than memory: then it is the disk), and the product of blocks that are
in memory already.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine

from dataflex.scoring.decide.topk import FEATURES, cosine_top_k
from dataflex.scoring.kept.store import ShardStore, StoreReader

DIRECTIONS, SHARE, SHARD, SEED = 4, 0.05, 16384, 0


class Part:
    """The first ``shards`` shards of a store."""

    def __init__(self, reader: StoreReader, shards: int) -> None:
        self.reader, self.shards = reader, shards

    def __len__(self) -> int:
        return self.shards

    def read(self, index: int, name: str) -> Any:
        return self.reader.read(index, name)


def make_store(folder: Path, rows: int, width: int) -> StoreReader:
    """Random rows; of every 1,000th the first value is large, so that direction 0 must find it."""
    store = ShardStore(folder, {"rows": f"{rows} {width}"}, np.arange(rows, dtype=np.int64), SHARD)
    store.resume()
    for index in range(len(store)):
        if index in store.shards:
            continue
        where = store.places(index)
        block = np.random.default_rng([SEED, index]).standard_normal((where.stop - where.start, width), np.float32)
        block[(np.arange(where.start, where.stop) % 1000) == 0, 0] = 100.0
        store.write(index, {FEATURES: block.astype(np.float16)})
    return StoreReader(folder, check=False)


def check(reader: StoreReader, directions: torch.Tensor, device: torch.device) -> float:
    """Largest difference from a float64 sort on the first shard; and planted rows come first everywhere."""
    rows = reader.read(0, FEATURES).astype(np.float64)
    unit = torch.nn.functional.normalize(directions.double(), dim=1).numpy()
    exact = (rows @ unit.T).max(axis=1) / np.linalg.norm(rows, axis=1)
    places, best = cosine_top_k(Part(reader, 1), directions, 100, device)
    expected = np.sort(exact)[::-1][: len(best)]
    error = float(np.abs(best - expected).max())
    assert error < 1e-4 and np.abs(exact[places] - expected).max() < 1e-4, error
    planted = -(-reader.count // 1000)
    places, _ = cosine_top_k(reader, directions, planted, device)
    assert (places % 1000 == 0).all(), "planted rows were missed"
    return error


class Peak:
    """Context manager: the process's own memory, MiB above what it was, at its highest."""

    def __enter__(self) -> Peak:
        self.before, self.most, self.running = own_mib(), 0.0, True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.most = max(self.most, own_mib() - self.before)
            time.sleep(0.01)

    def __exit__(self, *exc: object) -> None:
        self.running = False
        self.thread.join()


def own_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 2**10


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median over ``repeats`` calls after one that does not count."""
    taken = []
    for turn in range(repeats + 1):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if turn:
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def read_all(part: Part) -> None:
    """The bytes of every shard through one buffer, as the disk or the page cache gives them."""
    buffer = bytearray(32 << 20)
    for shard in part.reader.shards[: part.shards]:
        with (part.reader.folder / shard["files"][FEATURES]["file"]).open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def product_alone(width: int, rows: int, directions: torch.Tensor, device: torch.device) -> Callable[[], None]:
    """The same number of rows converted, normalised and multiplied, from one block that is in memory."""
    size = min(SHARD, max(1, (32 << 20) // (2 * width)))
    block, unit = torch.randn(size, width).half(), directions.to(device)

    def run() -> None:
        for _ in range(-(-rows // size)):
            wide = block.to(device).float()
            ((wide @ unit.T).max(dim=1).values / wide.norm(dim=1)).cpu()

    return run


def measure(reader: StoreReader, directions: torch.Tensor, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    error = check(reader, directions, device)
    width = reader.read(0, FEATURES).shape[1]
    table = []
    for shards in sorted({max(1, len(reader) // 4), max(1, len(reader) // 2), len(reader)}):
        part = Part(reader, shards)
        rows = min(shards * SHARD, reader.count)
        count = max(1, int(SHARE * rows))
        with Peak() as peak:
            cosine_top_k(part, directions, count, device)
        whole = seconds(lambda part=part, count=count: cosine_top_k(part, directions, count, device), repeats)  # type: ignore[misc]
        reading = seconds(lambda part=part: read_all(part), repeats)  # type: ignore[misc]
        product = seconds(product_alone(width, rows, directions, device), repeats)
        floor = max(reading, product)
        table.append(
            {
                "rows": rows,
                "width": width,
                "kept": count,
                "seconds": round(whole, 3),
                "reading_s": round(reading, 3),
                "product_s": round(product, 3),
                "of_floor": round(floor / whole, 3),
                "gb_per_s": round(2e-9 * rows * width / whole, 2),
                "own_memory_mib": round(peak.most, 1),
                "error": f"{error:.1e}",
                **machine(device),
            }
        )
        print({k: v for k, v in table[-1].items() if k not in machine(device)}, flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="for the store; kept, and used again (default: a temporary one)")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a few rows, to see that it runs")
    args = parser.parse_args()
    rows, width, repeats = (70_000, 64, 1) if args.smoke else (args.rows, args.width, args.repeats)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    directions = torch.randn(DIRECTIONS, width, generator=torch.Generator().manual_seed(SEED))
    directions[0] = 0
    directions[0, 0] = 1
    folder = args.folder or Path(tempfile.mkdtemp(prefix="topk-"))
    try:
        table = measure(make_store(folder, rows, width), directions, device, repeats)
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    if args.csv:
        with args.csv.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
