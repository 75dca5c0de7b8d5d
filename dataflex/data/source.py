"""Raw data as a `datasets.Dataset` of checked turns, read once and then cached by `datasets`.

Every row of the raw files is checked and converted while it is read, with fixed column types, so that no
type is ever guessed from the data. Rows that cannot be used stay in, with the reason in `problem`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.data.convert import Converted, Converter
from dataflex.data.info import DatasetInfo
from dataflex.data.read import column_names, list_files, read_rows
from dataflex.utils.errors import UserError
from dataflex.utils.files import sha256_of

if TYPE_CHECKING:
    from datasets import Dataset, Features

FORMAT_VERSION = "2"
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
        content: Any = ["hub", info.hub_id, info.subset, info.folder, info.split, raw._fingerprint]
        rows = partial(_hub_rows, raw, info.hub_id, converter)
    else:
        assert info.path is not None
        files = list_files(info.path)
        for path in files:
            _check_table(path, converter)
        content = [sha256_of(path) for path in files]
        rows = partial(_file_rows, files, converter)
    fingerprint = fingerprint_of("source", content, _conversion(converter))
    return cached_dataset(rows, source_features(converter.token_column is not None), fingerprint)


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
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        dataset = Dataset.from_generator(rows, features=features, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
    assert isinstance(dataset, Dataset)
    return dataset


def _conversion(converter: Converter) -> list[Any]:
    info = converter.info
    columns = {key: getattr(info.columns, key) for key in ("prompt", "query", "response", "history")}
    columns |= {"messages": info.columns.messages, "system": info.columns.system}
    token_weight = [] if converter.token_column is None else [converter.token_column]
    read = [converter.weight_column, converter.kept_column, *token_weight]
    return [converter.stage, info.formatting, columns, vars(info.tags), *read]


def _check_table(path: Path, converter: Converter) -> None:
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    names = column_names(path)
    if names is not None:
        converter.check_columns(names, str(path))


def _file_rows(files: tuple[Path, ...], converter: Converter) -> Iterator[dict[str, Any]]:
    for path in files:
        found: dict[str, None] = {}
        number = 0
        for number, row in read_rows(path, converter.wanted):
            found |= dict.fromkeys(row)
            yield _record(converter(row, f"{path}:{number}"), f"{path.name}:{number}", converter.token_column)
        if number == 0:
            raise UserError(f"{path}: the file holds no rows")
        converter.check_columns(found, str(path))


def _hub_rows(raw: Dataset, hub_id: str, converter: Converter) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(raw, start=1):
        where = f"{hub_id}:{number}"
        yield _record(converter(row, where), where, converter.token_column)


def _record(converted: Converted, where: str, token_column: str | None) -> dict[str, Any]:
    token_weight = {} if token_column is None else {"token_weight": converted.token_weight}
    return token_weight | {
        "turns": [{"role": role, "content": content} for role, content in converted.turns],
        "problem": converted.problem,
        "weight": converted.weight,
        "kept": converted.kept,
        "where": where,
    }


def load_from_hub(info: DatasetInfo) -> Dataset:
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetsError

    assert info.hub_id is not None
    try:
        dataset = load_dataset(info.hub_id, name=info.subset, data_dir=info.folder, split=info.split)
    except (DatasetsError, OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{info.where}.hf_hub_url: '{info.hub_id}' cannot be loaded: {text}") from None
    assert isinstance(dataset, Dataset)
    return dataset
