"""The files of `dataflex-cli score`: scores.npy and scores.jsonl, and scores.json that says what they are of."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import __version__
from dataflex.data.pool import Pool
from dataflex.utils.errors import UserError, cut
from dataflex.utils.records import DamagedError, FileRecord, Record, read_sealed, write_sealed

FACTS, ARRAY, LINES = "scores.json", "scores.npy", "scores.jsonl"
RECORD = np.dtype([("id", "<i8"), ("domain", "<i4"), ("row", "<i8"), ("score", "<f4")])


class Facts(Record):
    """What was scored, and with which weights.

    pool: its fingerprint. domains: names, in the order of the ids. contents: of each domain's raw data. step,
    learning_rate: of the checkpoint, where there was one; the rate is the mean since the checkpoint before it.
    features: the store of the samples' features, where they were kept. array: `ARRAY` as it was written. dataflex: the
    version.
    """

    pool: str
    domains: list[str]
    contents: list[str]
    component: str
    checkpoint: str | None
    step: int
    learning_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    features: str | None
    array: FileRecord | None = None
    dataflex: str = __version__


def write(folder: Path, facts: Facts, pool: Pool, scores: NDArray[np.float32]) -> None:
    """Write the three files; ``row`` is -1 where samples are not made from one row each."""
    table = np.zeros(len(pool), dtype=RECORD)
    table["id"], table["domain"], table["score"] = np.arange(len(pool)), pool.domain_ids, scores
    table["row"] = -1 if pool.rows is None else pool.rows
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{ARRAY}.tmp"
    with partial.open("wb") as handle:
        np.save(handle, table, allow_pickle=False)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, folder / ARRAY)
    partial = folder / f".{LINES}.tmp"
    with partial.open("w", encoding="utf-8") as lines:
        for record in table:
            line = {"id": int(record["id"]), "domain": facts.domains[record["domain"]], "row": int(record["row"])}
            lines.write(json.dumps(line | {"score": float(record["score"])}, ensure_ascii=False) + "\n")
    os.replace(partial, folder / LINES)
    written = facts.model_copy(update={"array": FileRecord.of(folder / ARRAY)})
    write_sealed(folder / FACTS, written.model_dump())


def read(folder: Path) -> tuple[Facts, NDArray[Any]]:
    """Facts and table (dtype `RECORD` [n], memory-mapped) of a folder. UserError where they are not there."""
    missing = [name for name in (FACTS, ARRAY) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"select_from: {folder} has no {missing[0]}; make it with: dataflex-cli score CFG output_dir={folder}"
        )
    try:
        facts = read_sealed(folder / FACTS, Facts)
        problem = "it names no array" if facts.array is None else facts.array.differs(folder / ARRAY)
        if problem:
            raise DamagedError(problem)
        table = np.load(folder / ARRAY, mmap_mode="r", allow_pickle=False)
    except (DamagedError, ValueError, EOFError, OSError) as error:
        raise UserError(f"select_from: {folder}: {cut(str(error), 200)}; score again") from None
    if table.dtype != RECORD or table.ndim != 1 or _strange(table, len(facts.domains)):
        raise UserError(f"select_from: {folder / ARRAY}: expected the columns {', '.join(RECORD.names or ())}")
    return facts, table


def _strange(table: NDArray[Any], domains: int) -> bool:
    """Whether a domain or an id is none of the pool's."""
    ids = np.arange(len(table))
    return bool((table["id"] != ids).any() or (table["domain"] < 0).any() or (table["domain"] >= domains).any())
