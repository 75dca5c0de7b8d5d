"""What a dataset's samples come from: its files, which of them a row lies in, and a digest of what they held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dataflex.data.sources.info import DatasetInfo
from dataflex.data.sources.rows import content_of

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Origin:
    """The files of one dataset.

    names: in the order in which they are read. starts: int64 [files], how many rows the files before each one hold.
    content: digest of all their bytes, `dataflex.data.sources.rows.content_of`.
    """

    names: tuple[str, ...]
    starts: NDArray[np.int64]
    content: str

    def places(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(index of the file, row in that file from 0) of rows that are counted from 0 over all files."""
        files = np.searchsorted(self.starts, rows, side="right") - 1
        return files, rows - self.starts[files]


def origin_of(info: DatasetInfo, source: Dataset) -> Origin | None:
    """The origin of ``source``, which `read_source` read; None for a dataset of the hub, which has no files here."""
    if info.path is None:
        return None
    content = content_of(info)
    if info.path.is_file():
        return Origin((info.path.name,), np.zeros(1, dtype=np.int64), content)
    import pyarrow.compute as pc

    names: list[str] = []
    starts: list[int] = []
    before = 0
    for chunk in source.data.column("where").chunks:
        runs = pc.run_end_encode(pc.replace_substring_regex(chunk, r":\d+$", ""))
        ends = [0, *runs.run_ends.to_pylist()]
        for name, first in zip(runs.values.to_pylist(), ends, strict=False):
            if not names or names[-1] != name:
                names.append(name)
                starts.append(before + first)
        before += len(chunk)
    return Origin(tuple(names), np.array(starts, dtype=np.int64), content)
