"""The raw rows behind samples: read again where a choice of them is written out, and known by their content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.data.sources.info import INFO_FILE, DatasetInfo, read_entries
from dataflex.data.sources.read import column_names, list_files, read_rows
from dataflex.data.sources.source import digests_of, fingerprint_of, hub_parts, load_from_hub


def content_of(info: DatasetInfo) -> str:
    """A digest of a dataset's raw content: of its files' bytes, or of what the hub gave."""
    if info.path is None:
        return fingerprint_of(*hub_parts(info), load_from_hub(info)._fingerprint)
    return fingerprint_of("files", digests_of(list_files(info.path, say=False)))


def raw_rows(info: DatasetInfo, numbers: np.ndarray) -> dict[int, dict[str, Any]]:
    """{row number: row} of the rows ``numbers``, counted from 0 over the dataset's files in order."""
    wanted = set(numbers.tolist())
    return {number: row for number, row in enumerate(_every_row(info)) if number in wanted}


def rows_in_files(
    info: DatasetInfo, places: Iterable[tuple[str | None, int]]
) -> dict[tuple[str | None, int], dict[str, Any]]:
    """{place: row} of the places that there are: (file name, row in that file from 0), on the hub (None, row)."""
    wanted = set(places)
    if info.path is None:
        return {(None, number): row for number, row in raw_rows(info, np.array([n for _, n in wanted])).items()}
    found: dict[tuple[str | None, int], dict[str, Any]] = {}
    for path in list_files(info.path, say=False):
        last = max((number for name, number in wanted if name == path.name), default=-1)
        if last >= 0:
            for number, (_, row) in enumerate(read_rows(path, column_names(path) or ())):
                if (path.name, number) in wanted:
                    found[path.name, number] = row
                if number == last:
                    break
    return found


def places_of(info: DatasetInfo) -> Iterator[tuple[str | None, int]]:
    """(file name, row in that file from 0) of every row, in order; on the hub (None, row)."""
    if info.path is None:
        yield from ((None, number) for number in range(len(load_from_hub(info))))
        return
    for path in list_files(info.path, say=False):
        yield from ((path.name, number) for number, _ in enumerate(read_rows(path, column_names(path) or ())))


def _every_row(info: DatasetInfo) -> Iterator[dict[str, Any]]:
    if info.path is None:
        yield from load_from_hub(info)
        return
    for path in list_files(info.path, say=False):
        for _, row in read_rows(path, column_names(path) or ()):
            yield row


def entry_for(info: DatasetInfo, dataset_dir: Path, file_name: str) -> dict[str, Any]:
    """A dataset_info.json entry for rows of ``info`` in another file: its formatting, columns and tags stay."""
    entries = read_entries(dataset_dir / INFO_FILE)
    kept = {key: entries[info.name][key] for key in ("formatting", "columns", "tags") if key in entries[info.name]}
    return {"file_name": file_name, **kept}
