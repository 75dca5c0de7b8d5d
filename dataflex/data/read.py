"""Rows of json, jsonl, csv, parquet and arrow files, one at a time, with errors that name file and row.

Row numbers start at 1: the line of a jsonl file, the object of a JSON list, the record of a table.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]
FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
_SAVED_DATASET_FILES = {"state.json", "dataset_info.json"}


def list_files(path: Path) -> tuple[Path, ...]:
    """The data files of ``path``: itself, or what the folder holds, sorted and all of one type."""
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
    if not files:
        raise UserError(f"{path}: the folder holds no {', '.join(FILE_TYPES)} file")
    types = sorted({file.suffix for file in files})
    if len(types) > 1:
        raise UserError(f"{path}: the folder mixes {', '.join(types)} files; keep one type in a folder")
    if len(files) < len(found):
        skipped = ", ".join(file.name for file in found if file not in files)
        logger.warning(f"{path}: not read: {skipped}")
    return files


def column_names(path: Path) -> list[str] | None:
    """The columns of a table, None for JSON, whose rows name their own."""
    if path.suffix == ".csv":
        return _csv_header(_csv_records(path), path)
    if path.suffix in (".parquet", ".arrow"):
        return list(_table_schema(path).names)
    return None


def read_rows(path: Path, wanted: Collection[str]) -> Iterator[tuple[int, Row]]:
    """(row number, row) of a file. A table's columns outside ``wanted`` are not read."""
    if path.suffix == ".csv":
        return _read_csv(path)
    if path.suffix == ".parquet":
        return _read_batches(_parquet_batches(path, wanted), path)
    if path.suffix == ".arrow":
        return _read_batches(_arrow_batches(path), path, wanted)
    if path.suffix == ".json" and _first_byte(path) == b"[":
        return _read_json_list(path)
    return _read_json_lines(path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, _decode(line, path, number, offset)
            offset += len(line)


def _decode(data: bytes, path: Path, first_line: int, offset: int) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        hint = " (it looks like UTF-16)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        bad = f"0x{data[error.start]:02x}"
        raise UserError(f"{path}:{line}: not UTF-8: byte {bad} at offset {offset + error.start}{hint}") from None
    return text.removeprefix("\ufeff") if offset == 0 else text


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _read_json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            expected = "one object a line" if path.suffix == ".jsonl" else "a list of objects, or one a line"
            raise UserError(
                f"{path}:{number}: malformed JSON at column {error.colno}: {error.msg}; expected {expected}"
            ) from None
        yield number, _object(row, path, number)


def _read_json_list(path: Path) -> Iterator[tuple[int, Row]]:
    text = _decode(path.read_bytes(), path, 1, 0)
    decoder = json.JSONDecoder()
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
        yield number, _object(row, path, number)
    if text[position + 1 :].strip():
        line = text.count("\n", 0, position) + 1
        raise UserError(f"{path}:{number}: malformed JSON: more text after the list that ends in line {line}")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _object(row: Any, path: Path, number: int) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: a row must be an object with named columns, got {_short(row)}")
    return row


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _csv_records(path: Path) -> Iterator[list[str]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    number = 0
    try:
        for number, record in enumerate(reader):  # noqa: B007 (number names the row in the error)
            if record:
                yield record
    except csv.Error as error:
        raise UserError(f"{path}:{number + 1}: malformed CSV near line {reader.line_num}: {error}") from None


def _csv_header(records: Iterator[list[str]], path: Path) -> list[str]:
    header = next(records, None)
    if header is None:
        raise UserError(f"{path}: the file is empty")
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise UserError(f"{path}: the header names a column twice: {', '.join(doubled)}")
    return header


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    records = _csv_records(path)
    header = _csv_header(records, path)
    for number, record in enumerate(records, start=1):
        if len(record) != len(header):
            raise UserError(f"{path}:{number}: {len(record)} fields, but the header has {len(header)}")
        yield number, dict(zip(header, record, strict=True))


def _table_schema(path: Path) -> pa.Schema:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_schema(path)
        with pa.memory_map(str(path)) as source:
            return _open_arrow(source).schema
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable {path.suffix} file: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _open_arrow(source: pa.MemoryMappedFile) -> pa.RecordBatchStreamReader | pa.RecordBatchFileReader:
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_file(source)


def _parquet_batches(path: Path, wanted: Collection[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        columns = [name for name in file.schema_arrow.names if name in wanted]
        yield from file.iter_batches(batch_size=1024, columns=columns)


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        reader = _open_arrow(source)
        if isinstance(reader, pa.RecordBatchFileReader):
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from reader


def _read_batches(
    batches: Iterator[pa.RecordBatch], path: Path, wanted: Collection[str] | None = None
) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa

    number = 0
    try:
        for batch in batches:
            if wanted is not None:
                batch = batch.select([name for name in batch.schema.names if name in wanted])
            for start in range(0, batch.num_rows, 1024):
                for row in batch.slice(start, 1024).to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: unreadable after row {number}: {_one_line(error)}") from None
