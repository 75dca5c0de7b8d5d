"""The rows of a streamed dataset: pass after pass, in chunks that are shuffled, from any chunk on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from dataflex.core.plan import generator
from dataflex.data.report import DomainReport
from dataflex.data.sources.convert import Converter
from dataflex.data.sources.info import DatasetInfo
from dataflex.data.sources.read import Cursor, list_files
from dataflex.data.sources.source import check_table, hub_parts, record_of, rows_of_file, stream_from_hub
from dataflex.scoring.progress import size
from dataflex.utils.errors import UserError
from dataflex.utils.files import BLOCK, sample_digest
from dataflex.utils.logging import logger

Record = dict[str, Any]
MOST_HASHED = 1 << 30
"""Bytes of a stream's files that are read at its start, to know them again: all of them, or evenly spaced blocks."""


class RowSource(ABC):
    """Reads a dataset from its beginning or from where an earlier reading stood, as records of `source_features`.

    Iterating goes on until the end of the pass. parts: what names the data, for a fingerprint. line: likewise, for the
    screen.
    """

    converter: Converter
    parts: list[Any]
    line: str

    @abstractmethod
    def begin(self, epoch: int, state: dict[str, Any] | None = None) -> None:
        """Go to the beginning of a pass, or to what `state` returned in that pass."""

    @abstractmethod
    def __next__(self) -> Record: ...

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Where the reading stands: after the last row that was given out."""

    @abstractmethod
    def check_columns(self) -> None:
        """UserError where what was read so far lacks a column."""


class FileRows(RowSource):
    """The rows of local files, known by sizes and content. shuffled: each pass has the files in an order of its own."""

    def __init__(self, info: DatasetInfo, converter: Converter, seed: int, shuffled: bool) -> None:
        assert info.path is not None
        self.name, self.converter, self.seed, self.shuffled = info.name, converter, seed, shuffled
        self.files = list_files(info.path)
        for path in self.files:
            check_table(path, converter)
        sizes = [path.stat().st_size for path in self.files]
        budget = max(MOST_HASHED // len(self.files), 16 * BLOCK)
        content = [sample_digest(path, budget if sum(sizes) > MOST_HASHED else MOST_HASHED) for path in self.files]
        self.parts = ["files", [list(part) for part in zip([p.name for p in self.files], sizes, content, strict=True)]]
        files = f"{len(self.files)} files" if len(self.files) > 1 else self.files[0].name
        self.line = f"{files}, {size(sum(sizes))}"
        self.begin(0)

    def begin(self, epoch: int, state: dict[str, Any] | None = None) -> None:
        order = list(range(len(self.files)))
        if self.shuffled:
            order = generator(self.seed, "stream files", self.name, epoch).permutation(len(self.files)).tolist()
        self._order = [self.files[number] for number in order]
        self._file = state["file"] if state else 0
        self._cursor = Cursor(**state["cursor"]) if state else Cursor()
        self._found: dict[str, None] = {}
        self._rows = self._read()

    def _read(self) -> Iterator[Record]:
        while self._file < len(self._order):
            self._found, self._whole = {}, self._cursor.row == 0
            yield from rows_of_file(self._order[self._file], self.converter, self._cursor, self._found)
            self._file, self._cursor, self._found = self._file + 1, Cursor(), {}

    def __next__(self) -> Record:
        return next(self._rows)

    def state(self) -> dict[str, Any]:
        return {"file": self._file, "cursor": dict(vars(self._cursor))}

    def check_columns(self) -> None:
        if self._found and self._whole:
            path: Path = self._order[self._file]
            self.converter.check_columns(self._found, str(path))


class HubRows(RowSource):
    """The rows of a dataset of the hub, through `datasets`."""

    def __init__(self, info: DatasetInfo, converter: Converter) -> None:
        self.info, self.converter = info, converter
        self._dataset = stream_from_hub(info)
        self.parts, self.line = hub_parts(info), f"{info.hub_id} of the hub"
        if self._dataset.column_names is not None:
            converter.check_columns(self._dataset.column_names, info.where)
        self._first = self._dataset.state_dict()
        self._found = dict[str, None]()
        self.begin(0)

    def begin(self, epoch: int, state: dict[str, Any] | None = None) -> None:
        self._number = state["row"] if state else 0
        self._begun: Any = state["dataset"] if state else self._first
        self._dataset.load_state_dict(deepcopy(self._begun))
        self._rows: Iterator[Record] = iter(self._dataset)

    def __next__(self) -> Record:
        try:
            row = next(self._rows)
        except (OSError, ValueError) as error:
            text = " ".join(str(error).split())
            raise UserError(f"{self.info.hub_id}: unreadable after row {self._number}: {text}") from None
        self._number, self._begun = self._number + 1, None
        self._found |= dict.fromkeys(row)
        where = f"{self.info.hub_id}:{self._number}"
        return record_of(row, self.converter, where, where)

    def state(self) -> dict[str, Any]:
        """As `RowSource.state`; before its first row the dataset itself still has the state of the pass before."""
        return {"row": self._number, "dataset": self._begun or self._dataset.state_dict()}

    def check_columns(self) -> None:
        if self._found:
            self.converter.check_columns(self._found, self.info.where)


class Chunks:
    """The usable rows of a stream without an end, a shuffled chunk at a time.

    A chunk holds what is usable of the next ``size`` rows of a pass; its order depends on seed, dataset, pass and
    chunk alone, so a chunk that is read again comes in the same order. most: rows of a pass, None for all.

    Attributes:
        epoch: the pass that the last chunk is of, from 0.
    """

    def __init__(self, source: RowSource, info: DatasetInfo, seed: int, size: int, most: int | None) -> None:
        self.source, self.info, self.seed, self.size = source, info, seed, size
        self.most = most
        self.report = DomainReport(info.name)
        self.epoch, self._chunk, self._used = 0, 0, 0
        self._ended = False
        self._said = 0
        self._start = self._state()

    def __next__(self) -> list[Record]:
        rows: list[Record] = []
        while not rows:
            if self._ended:
                self.epoch, self._chunk, self._used, self._ended = self.epoch + 1, 0, 0, False
                self.source.begin(self.epoch)
            self._start = self._state()
            rows = self._read()
            self._check()
            self._chunk += 1
        draw = generator(self.seed, "stream chunk", self.info.name, self.epoch, self._chunk - 1)
        return [rows[place] for place in draw.permutation(len(rows))]

    def _read(self) -> list[Record]:
        rows: list[Record] = []
        for _ in range(self.size):
            if self.most is not None and self._used == self.most:
                self._ended = True
                break
            try:
                row = next(self.source)
            except StopIteration:
                self._ended = True
                break
            self.report.read += 1
            if row["problem"]:
                self.report.drop(row["problem"], row["where"])
                continue
            self._used += 1
            rows.append(row)
        return rows

    def _check(self) -> None:
        """Say what is dropped, again whenever it has doubled; UserError where columns lack, or all is dropped."""
        self.source.check_columns()
        report = self.report
        if report.read == 0:
            raise UserError(f"{self.info.where}: the dataset holds no rows")
        dropped = sum(count for count, _ in report.dropped.values())
        if dropped == report.read:
            raise UserError(f"{self.info.where}: none of its first {dropped} rows can be used: {report.reasons}")
        if dropped and dropped >= 2 * self._said:
            self._said = dropped
            logger.warning(f"{report.name}: {dropped} of {report.read} rows read so far dropped: {report.reasons}")

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "chunk": self._chunk,
            "used": self._used,
            "source": self.source.state(),
            "read": self.report.read,
            "dropped": dict(self.report.dropped),
            "said": self._said,
        }

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs for the last chunk to come next."""
        return self._start

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self._chunk, self._used = state["epoch"], state["chunk"], state["used"]
        self.report.read, self.report.dropped, self._said = state["read"], dict(state["dropped"]), state["said"]
        self._ended = False
        self.source.begin(self.epoch, state["source"])
