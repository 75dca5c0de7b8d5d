"""decisions/step_N.parquet: a row for every sample of the pool, with what a decision went by and what it took."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dataflex.data.pool import Pool
from dataflex.utils.errors import UserError, cut, listed, nearest
from dataflex.utils.records import fitted

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

ROW_GROUP = 65536
FACTS = b"dataflex"
SCORE = "score"


@dataclass(frozen=True)
class Facts:
    """What a table is of, kept in its metadata.

    scored: how many samples have a score. contents: {dataset: digest of its files}, of those that have files.
    """

    step: int
    component: str
    scored: int
    contents: dict[str, str]


@dataclass(frozen=True)
class Column:
    """A column of a table. values: the part of a range of the rows, as pyarrow takes it."""

    name: str
    type: str
    values: Callable[[slice], Any]


def write_table(path: Path, columns: list[Column], rows: int, facts: Facts | None = None) -> None:
    """Write ``rows`` rows in groups of `ROW_GROUP`, through a temporary file and a rename; makes the folder.

    facts: None where they stand elsewhere.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(column.name, column.type) for column in columns])
    if facts is not None:
        schema = schema.with_metadata({FACTS: json.dumps(asdict(facts), sort_keys=True).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as handle:
        with pq.ParquetWriter(handle, schema) as writer:
            for start in range(0, rows, ROW_GROUP):
                part = slice(start, min(start + ROW_GROUP, rows))
                arrays = [pa.array(column.values(part), column.type) for column in columns]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=ROW_GROUP)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def pool_columns(pool: Pool) -> list[Column]:
    """sample_id, dataset, file and row: which sample it is, and where it was read."""
    names = np.array(pool.domain_names, dtype=object)
    return [
        Column("sample_id", "int64", lambda part: np.arange(part.start, part.stop)),
        Column("dataset", "string", lambda part: names[pool.domain_ids[part]]),
        Column("file", "string", lambda part: _places(pool, part)[0]),
        Column("row", "int64", lambda part: _places(pool, part)[1]),
    ]


def score_columns(scored: Mapping[str, NDArray[Any]], pool_size: int, source: str) -> list[Column]:
    """A column for each of ``scored``, of which ``score`` is null where it is NaN, and ``rank``.

    scored: {name: [pool_size]}; ``score`` may be missing, the columns are null then. rank: 1 + how many scores
    are larger, so that equal ones have the same. source: says in a UserError who scored.
    """
    for name, values in scored.items():
        if np.shape(values) != (pool_size,):
            raise UserError(f"{source}: scored['{name}']: expected {pool_size} values, got shape {np.shape(values)}")
    scores = np.asarray(scored.get(SCORE, np.full(pool_size, np.nan)), dtype=np.float64)
    missing, rank = np.isnan(scores), np.empty(pool_size, dtype=np.int64)
    order = np.argsort(-scores)  # NaN last
    rank[order] = 1 + np.searchsorted(-scores[order], -scores[order])
    return [
        Column(SCORE, "float64", lambda part: _masked(scores[part], missing[part])),
        Column("rank", "int64", lambda part: _masked(rank[part], missing[part])),
        *(_plain(name, np.asarray(values)) for name, values in scored.items() if name != SCORE),
    ]


def _plain(name: str, values: NDArray[Any]) -> Column:
    """Of numbers, or of texts (objects)."""
    return Column(name, "string" if values.dtype == object else values.dtype.name, lambda part: values[part])


def picked_column(picks: NDArray[np.int64], pool_size: int, replacement: bool) -> Column:
    """picked: whether a sample was taken; with replacement, how often."""
    counts = np.bincount(picks, minlength=pool_size)
    if replacement:
        return Column("picked", "int64", lambda part: counts[part])
    return Column("picked", "bool", lambda part: counts[part] > 0)


def contents_of(pool: Pool) -> dict[str, str]:
    """{dataset: digest of its files} of the pool's datasets that have files."""
    named = zip(pool.domain_names, pool.origins or [], strict=False)
    return {name: origin.content for name, origin in named if origin is not None}


def _places(pool: Pool, part: slice) -> tuple[NDArray[Any], Any]:
    """File name (None without files) and row in the file of each sample of a range; packed blocks have neither."""
    count = part.stop - part.start
    files: NDArray[Any] = np.full(count, None, dtype=object)
    if pool.rows is None:
        return files, [None] * count
    rows = np.array(pool.rows[part], dtype=np.int64)
    domains = pool.domain_ids[part]
    for domain in np.unique(domains):
        origin = None if pool.origins is None else pool.origins[domain]
        if origin is not None:
            mine = domains == domain
            places, rows[mine] = origin.places(rows[mine])
            files[mine] = np.array(origin.names, dtype=object)[places]
    return files, rows


def _masked(values: NDArray[Any], missing: NDArray[np.bool_]) -> pa.Array:
    import pyarrow as pa

    return pa.array(values, mask=missing)


def read_facts(path: Path) -> Facts:
    """What a table says it is of. UserError where it is not one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if FACTS not in metadata:
        raise UserError(f"{path}: is not the table of a decision")
    try:
        facts: Facts = fitted(Facts, json.loads(metadata[FACTS]), FACTS.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not the table of a decision ({cut(str(error), 200)})") from None
    return facts


def read_parts(path: Path) -> Iterator[pd.DataFrame]:
    """A table in parts of at most `ROW_GROUP` rows. UserError where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROW_GROUP):
                yield batch.to_pandas()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


def read_columns(path: Path, names: Sequence[str]) -> pd.DataFrame:
    """These columns of a table. UserError where it cannot be read, or does not have them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow.names
            missing = [name for name in names if name not in there]
            if missing:
                raise UserError(f"{path}: no column '{missing[0]}'{nearest(missing[0], there)}; it has {listed(there)}")
            return file.read(list(names)).to_pandas()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
