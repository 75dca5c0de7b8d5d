"""The raw rows behind samples: read again where a choice of them is written out, and known by their content."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.data.info import INFO_FILE, DatasetInfo
from dataflex.data.read import column_names, list_files, read_rows
from dataflex.data.source import fingerprint_of, hub_parts, load_from_hub
from dataflex.utils.files import sha256_of


def content_of(info: DatasetInfo) -> str:
    """A digest of a dataset's raw content: of its files' bytes, or of what the hub gave."""
    if info.path is None:
        return fingerprint_of(*hub_parts(info), load_from_hub(info)._fingerprint)
    return fingerprint_of("files", [sha256_of(path) for path in list_files(info.path)])


def raw_rows(info: DatasetInfo, numbers: np.ndarray) -> dict[int, dict[str, Any]]:
    """{row number: row} of the rows ``numbers``, counted from 0 over the dataset's files in order."""
    wanted = set(numbers.tolist())
    return {number: row for number, row in enumerate(_every_row(info)) if number in wanted}


def _every_row(info: DatasetInfo) -> Iterator[dict[str, Any]]:
    if info.path is None:
        yield from load_from_hub(info)
        return
    for path in list_files(info.path):
        for _, row in read_rows(path, column_names(path) or ()):
            yield row


def entry_for(info: DatasetInfo, dataset_dir: Path, file_name: str) -> dict[str, Any]:
    """A dataset_info.json entry for rows of ``info`` in another file: its formatting, columns and tags stay."""
    entries = json.loads((dataset_dir / INFO_FILE).read_bytes().decode("utf-8-sig"))
    kept = {key: entries[info.name][key] for key in ("formatting", "columns", "tags") if key in entries[info.name]}
    return {"file_name": file_name, **kept}
