"""Raw data as a `datasets.Dataset` of checked turns, read once and then cached by `datasets`.

Every row of the raw files is checked and converted while it is read, with fixed column types, so that no
type is ever guessed from the data. Rows that cannot be used stay in, with the reason in `problem`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.data.cache import cached, cause_of
from dataflex.data.sources.convert import Converter
from dataflex.data.sources.info import DatasetInfo
from dataflex.data.sources.read import Cursor, column_names, list_files, read_rows
from dataflex.utils.errors import UserError, cut
from dataflex.utils.files import sha256_of

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

FORMAT_VERSION = "3"
"""Raised whenever the same data is converted or tokenised otherwise: older caches are then ignored."""


def fingerprint_of(*parts: Any) -> str:
    """32 hex digits over JSON-like parts; the same in every process and on every machine."""
    text = json.dumps([FORMAT_VERSION, *parts], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_source(info: DatasetInfo, converter: Converter) -> Dataset:
    """Every row of a dataset as turns.

    Columns: `turns` (list of {role, content}), `problem` ('' or why the row cannot be used), `weight`
    (float32), `kept` (text, '' where no column is kept) and `where` (file:row), and with a column of token
    weights `token_weight` (float32). Its `_fingerprint` covers the content of the raw data and the conversion.
    Raises UserError with the place of what is wrong.
    """
    if info.hub_id is not None:
        raw = load_from_hub(info)
        converter.check_columns(raw.column_names, info.where)
        content: Any = [*hub_parts(info), raw._fingerprint]
        rows = partial(_hub_rows, raw, info.hub_id, converter)
    else:
        assert info.path is not None
        files = list_files(info.path)
        for path in files:
            check_table(path, converter)
        content = digests_of(files)
        rows = partial(_file_rows, files, converter)
    fingerprint = fingerprint_of("source", content, conversion_parts(converter))
    return cached_dataset(rows, source_features(converter.token_column is not None), fingerprint)


def digests_of(files: Iterable[Path]) -> list[str]:
    """The sha256 of each file; a file that did not change is read once in a process."""
    return [_digest(path, status.st_size, status.st_mtime_ns) for path in files for status in [path.stat()]]


@cache
def _digest(path: Path, size: int, changed_ns: int) -> str:
    return sha256_of(path)


def source_features(token_weight: bool = False) -> Features:
    from datasets import Features, List, Value

    return Features(
        {
            "turns": [{"role": Value("string"), "content": Value("string")}],
            "problem": Value("string"),
            "weight": Value("float32"),
            "kept": Value("string"),
            "where": Value("string"),
        }
        | ({"token_weight": List(Value("float32"))} if token_weight else {})
    )


def cached_dataset(rows: Any, features: Features, fingerprint: str) -> Dataset:
    """The dataset of a generator function, made once and memory-mapped from the cache afterwards."""

    def make(folder: Path) -> Dataset:
        from datasets import Dataset
        from datasets.exceptions import DatasetGenerationError

        try:
            made = Dataset.from_generator(rows, features=features, fingerprint=fingerprint, cache_dir=str(folder))
        except DatasetGenerationError as error:
            raise cause_of(error) from None
        assert isinstance(made, Dataset)
        return made

    return cached(fingerprint, make)


def hub_parts(info: DatasetInfo) -> list[Any]:
    """What names the data of a hub dataset, for a fingerprint."""
    return ["hub", info.hub_id, info.subset, info.folder, info.split]


def conversion_parts(converter: Converter) -> list[Any]:
    """What decides how rows become turns, for a fingerprint."""
    info = converter.info
    columns = {key: getattr(info.columns, key) for key in ("prompt", "query", "response", "history")}
    columns |= {key: getattr(info.columns, key) for key in ("messages", "system", "tools")}
    token_weight = [] if converter.token_column is None else [converter.token_column]
    read = [converter.weight_column, converter.kept_column, *token_weight]
    if converter.kept_column is not None and not converter.kept_needed:
        read.append("where it is there")
    return [converter.stage, info.formatting, columns, vars(info.tags), *read]


def check_table(path: Path, converter: Converter) -> None:
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    names = column_names(path)
    if names is not None:
        converter.check_columns(names, str(path))


def _file_rows(files: tuple[Path, ...], converter: Converter) -> Iterator[dict[str, Any]]:
    for path in files:
        yield from rows_of_file(path, converter, Cursor(), {})


def rows_of_file(path: Path, converter: Converter, cursor: Cursor, found: dict[str, None]) -> Iterator[dict[str, Any]]:
    """The rows of a file after ``cursor``, which moves along, as records of `source_features`.

    found: takes in the columns of the rows; at the end of a file that is read from its beginning they are checked.
    """
    whole = cursor.row == 0
    for number, row in read_rows(path, converter.wanted, cursor):
        found |= dict.fromkeys(row)
        yield record_of(row, converter, f"{path}:{number}", f"{path.name}:{number}")
    if cursor.row == 0:
        raise UserError(f"{path}: the file holds no rows")
    if whole:
        converter.check_columns(found, str(path))


def _hub_rows(raw: Dataset, hub_id: str, converter: Converter) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(raw, start=1):
        where = f"{hub_id}:{number}"
        yield record_of(row, converter, where, where)


def record_of(row: Mapping[str, Any], converter: Converter, place: str, where: str) -> dict[str, Any]:
    """A row as a record of `source_features`; ``place`` names it in errors, ``where`` in the record."""
    converted = converter(row, place)
    token_weight = {} if converter.token_column is None else {"token_weight": converted.token_weight}
    return token_weight | {
        "turns": [{"role": role, "content": content} for role, content in converted.turns],
        "problem": converted.problem,
        "weight": converted.weight,
        "kept": converted.kept,
        "where": where,
    }


def load_from_hub(info: DatasetInfo) -> Dataset:
    from datasets import Dataset

    dataset = _load_from_hub(info, streaming=False)
    assert isinstance(dataset, Dataset)
    return dataset


def stream_from_hub(info: DatasetInfo) -> IterableDataset:
    from datasets import IterableDataset

    dataset = _load_from_hub(info, streaming=True)
    assert isinstance(dataset, IterableDataset)
    return dataset


def _load_from_hub(info: DatasetInfo, streaming: bool) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    assert info.hub_id is not None
    try:
        return load_dataset(info.hub_id, name=info.subset, data_dir=info.folder, split=info.split, streaming=streaming)
    except (DatasetsError, OSError, ValueError) as error:
        text = cut(" ".join(str(error).split()), 500)
        raise UserError(f"{info.where}.hf_hub_url: '{info.hub_id}' cannot be loaded: {text}") from None
