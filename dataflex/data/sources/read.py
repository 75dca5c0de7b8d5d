"""Rows of json, jsonl, csv, parquet and arrow files, one at a time, with errors that name file and row.

Row numbers start at 1: the line of a jsonl file, the object of a JSON list, the record of a table.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.utils.errors import UserError, cut, listed, shown
from dataflex.utils.logging import logger

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]
FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt")
_BROKEN_TABLE = (OSError, ValueError, OverflowError, MemoryError, TypeError, KeyError)
_SAVED_DATASET_FILES = {"state.json", "dataset_info.json"}


@dataclass
class Cursor:
    """How far a file is read, so that it can be gone on with: its rows, and in a text file its lines and bytes."""

    row: int = 0
    line: int = 0
    offset: int = 0


def list_files(path: Path, say: bool = True) -> tuple[Path, ...]:
    """The data files of ``path``: itself, or what the folder holds, sorted and all of one type.

    say: warn of files that are passed over.
    """
    if path.is_file():
        if path.suffix not in FILE_TYPES:
            raise UserError(f"{path}: unknown type '{path.suffix}'; valid: {', '.join(FILE_TYPES)}")
        return (path,)
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder")
    found = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
    if {file.name for file in found} >= _SAVED_DATASET_FILES:
        found = [file for file in found if file.suffix == ".arrow"]
    files = tuple(file for file in found if file.suffix in FILE_TYPES)
    if any(file.suffix != ".txt" for file in files):  # beside data it says something about it
        files = tuple(file for file in files if file.suffix != ".txt")
    if not files:
        raise UserError(f"{path}: the folder holds no {', '.join(FILE_TYPES)} file")
    types = sorted({file.suffix for file in files})
    if len(types) > 1:
        raise UserError(f"{path}: the folder mixes {', '.join(types)} files; keep one type in a folder")
    if say and len(files) < len(found):
        skipped = ", ".join(file.name for file in found if file not in files)
        logger.warning(f"{path}: not read: {skipped}")
    return files


def column_names(path: Path) -> list[str] | None:
    """The columns of a table, ``text`` of a .txt file, None for JSON, whose rows name their own."""
    if path.suffix == ".csv":
        return _csv_header(_csv_records(path, Cursor()), path)
    if path.suffix in (".parquet", ".arrow"):
        return _table_columns(path)
    return ["text"] if path.suffix == ".txt" else None


def read_rows(path: Path, wanted: Collection[str], cursor: Cursor | None = None) -> Iterator[tuple[int, Row]]:
    """(row number, row) of a file. A table's columns outside ``wanted`` are not read.

    cursor: moves along with the rows; one of an earlier reading makes this one begin after it. What lies before is not
    read again, except in a .json list, which is one text.
    """
    cursor = cursor or Cursor()
    if path.suffix == ".csv":
        return _read_csv(path, cursor)
    if path.suffix == ".parquet":
        return _read_batches(_parquet_batches(path, wanted, cursor.row), path, cursor)
    if path.suffix == ".arrow":
        return _read_batches(_arrow_batches(path), path, cursor, wanted)
    if path.suffix == ".txt":
        return _read_text(path, cursor)
    if path.suffix == ".json" and _first_byte(path) == b"[":
        return _read_json_list(path, cursor)
    return _read_json_lines(path, cursor)


def _lines(path: Path, cursor: Cursor) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        file.seek(cursor.offset)
        for line in file:
            number, offset = cursor.line + 1, cursor.offset
            cursor.line, cursor.offset = number, offset + len(line)
            yield number, _decode(line, path, number, offset)


def _decode(data: bytes, path: Path, first_line: int, offset: int) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        hint = " (it looks like UTF-16)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        bad = f"0x{data[error.start]:02x}"
        raise UserError(f"{path}:{line}: not UTF-8: byte {bad} at offset {offset + error.start}{hint}") from None
    return text.removeprefix("\ufeff") if offset == 0 else text


def _read_text(path: Path, cursor: Cursor) -> Iterator[tuple[int, Row]]:
    """Every line is a row, its ``text``."""
    for number, line in _lines(path, cursor):
        cursor.row += 1
        yield number, {"text": line.rstrip("\r\n")}


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _read_json_lines(path: Path, cursor: Cursor) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(path, cursor):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            expected = "one object a line" if path.suffix == ".jsonl" else "a list of objects, or one a line"
            raise UserError(
                f"{path}:{number}: malformed JSON at column {error.colno}: {error.msg}; expected {expected}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: {too_much(error)}") from None
        cursor.row += 1
        yield number, _object(row, path, number)


def _read_json_list(path: Path, cursor: Cursor) -> Iterator[tuple[int, Row]]:
    text = _decode(path.read_bytes(), path, 1, 0)
    decoder, done = json.JSONDecoder(), cursor.row
    position, number = _skip_space(text, text.index("[") + 1), 0
    while text[position : position + 1] != "]":
        number += 1
        try:
            row, position = decoder.raw_decode(text, position)
            position = _skip_space(text, position)
            if text[position : position + 1] == ",":
                position = _skip_space(text, position + 1)
                if text[position : position + 1] == "]":
                    raise json.JSONDecodeError("a comma before the closing bracket", text, position)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("expected ',' or ']'", text, position)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{number}: malformed JSON in line {error.lineno}, column {error.colno}: {error.msg}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: {too_much(error)}") from None
        if number > done:
            cursor.row = number
            yield number, _object(row, path, number)
    if text[position + 1 :].strip():
        line = text.count("\n", 0, position) + 1
        raise UserError(f"{path}:{number}: malformed JSON: more text after the list that ends in line {line}")


def too_much(error: Exception) -> str:
    """What is said of JSON that is well-formed and still cannot be taken."""
    if isinstance(error, RecursionError):
        return "lists and objects are nested too deep"
    return f"a number has more than {sys.get_int_max_str_digits():,} digits; write it as text"


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _object(row: Any, path: Path, number: int) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: a row must be an object with named columns, got {shown(row)}")
    return row


def _csv_records(path: Path, cursor: Cursor) -> Iterator[list[str]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line for _, line in _lines(path, cursor)), strict=True)
    try:
        yield from (record for record in reader if record)
    except csv.Error as error:
        row = cursor.row + 1
        raise UserError(f"{path}:{row}: malformed CSV near line {cursor.line}: {error}") from None


def _csv_header(records: Iterator[list[str]], path: Path) -> list[str]:
    header = next(records, None)
    if header is None:
        raise UserError(f"{path}: the file is empty")
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise UserError(f"{path}: the header names a column twice: {listed(doubled)}")
    return header


def _read_csv(path: Path, cursor: Cursor) -> Iterator[tuple[int, Row]]:
    at_start = cursor.offset == 0
    header = _csv_header(_csv_records(path, Cursor()), path)
    records = _csv_records(path, cursor)
    if at_start:
        next(records)
    for record in records:
        cursor.row += 1
        if len(record) != len(header):
            raise UserError(f"{path}:{cursor.row}: {len(record)} fields, but the header has {len(header)}")
        yield cursor.row, dict(zip(header, record, strict=True))


def _table_columns(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            return list(pyarrow.parquet.read_schema(path).names)
        with pa.memory_map(str(path)) as source:
            return list(_open_arrow(source).schema.names)
    except (pa.ArrowException, *_BROKEN_TABLE) as error:
        raise UserError(f"{path}: not a readable {path.suffix} file: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return cut(" ".join(str(error).split()), 300)


def _open_arrow(source: pa.MemoryMappedFile) -> pa.RecordBatchStreamReader | pa.RecordBatchFileReader:
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_file(source)


def _parquet_batches(path: Path, wanted: Collection[str], done: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(rows before it, batch), without the row groups that lie within the first ``done`` rows."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        columns = [name for name in file.schema_arrow.names if name in wanted]
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        before = first = 0
        while first < len(sizes) and before + sizes[first] <= done:
            before, first = before + sizes[first], first + 1
        groups = list(range(first, len(sizes)))
        for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=columns):
            yield before, batch
            before += batch.num_rows


def _arrow_batches(path: Path) -> Iterator[tuple[int, pa.RecordBatch]]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        reader = _open_arrow(source)
        is_file = isinstance(reader, pa.RecordBatchFileReader)
        before = 0
        for batch in (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader:
            yield before, batch
            before += batch.num_rows


def _read_batches(
    batches: Iterator[tuple[int, pa.RecordBatch]], path: Path, cursor: Cursor, wanted: Collection[str] | None = None
) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa

    done = cursor.row
    try:
        for before, batch in batches:
            if wanted is not None:
                batch = batch.select([name for name in batch.schema.names if name in wanted])
            batch.validate(full=True)  # else offsets that lead out of a damaged file's buffers end the process
            for start in range(max(0, done - before), batch.num_rows, 1024):
                for row in batch.slice(start, 1024).to_pylist():
                    cursor.row += 1
                    yield cursor.row, row
    except (pa.ArrowException, *_BROKEN_TABLE) as error:
        raise UserError(f"{path}: unreadable after row {cursor.row}: {_one_line(error)}") from None
