"""Write the demo's data: ``python -m dataflex.demo.generate FOLDER``.

Four pool files of unequal size, one per domain, a target set of date arithmetic that shares no row with
the pool, and the dataset_info.json that names them. The same seed gives the same bytes.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from dataflex.demo import tasks

MAKERS: dict[str, Callable[[random.Random], tasks.Row]] = {
    "arithmetic": tasks.arithmetic,
    "strings": tasks.strings,
    "units": tasks.units,
    "dates": tasks.dates,
}
POOL_SIZES = {"arithmetic": 800, "strings": 550, "units": 350, "dates": 300}
TARGET_DOMAIN = "dates"
TARGET_SIZE = 64


def make_rows(domain: str, count: int, seed: int) -> list[tasks.Row]:
    """``count`` different rows of one domain."""
    rng = random.Random(f"{domain}-{seed}")
    rows: dict[tuple[str, str], tasks.Row] = {}
    while len(rows) < count:
        row = MAKERS[domain](rng)
        rows.setdefault((row["instruction"], row["input"]), row)
    return list(rows.values())


def generate(folder: Path, seed: int = 0) -> dict[str, int]:
    """Write the five data files and dataset_info.json into ``folder``; returns the rows of each set."""
    sets: dict[str, list[tasks.Row]] = {}
    for domain, size in POOL_SIZES.items():
        held_out = TARGET_SIZE if domain == TARGET_DOMAIN else 0
        rows = make_rows(domain, size + held_out, seed)
        sets[domain] = rows[:size]
        if held_out:
            sets[f"{domain}_target"] = rows[size:]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        _write_json(folder / f"{name}.json", rows)
    _write_json(folder / "dataset_info.json", {name: {"file_name": f"{name}.json"} for name in sets})
    return {name: len(rows) for name, rows in sets.items()}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    counts = generate(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: " + ", ".join(f"{name} {rows}" for name, rows in counts.items()))
