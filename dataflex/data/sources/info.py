"""`dataset_info.json`: which datasets there are, where they lie and how their columns are called."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from dataflex.data.sources.read import too_much
from dataflex.utils.errors import UserError, cut, listed, nearest, shown
from dataflex.utils.files import unusable_path
from dataflex.utils.logging import logger

INFO_FILE = "dataset_info.json"
FORMATTINGS = ("alpaca", "sharegpt", "openai")
_KEYS = (
    "file_name",
    "hf_hub_url",
    "formatting",
    "subset",
    "split",
    "folder",
    "num_samples",
    "columns",
    "tags",
    "ranking",
)
_OTHER_HUBS = ("ms_hub_url", "om_hub_url")
_REFUSED = {
    "script_url": "loading scripts are foreign code; convert the data to json, jsonl, csv or parquet",
    "cloud_file_name": "cloud storage is not read; copy the file into dataset_dir and use file_name",
    **dict.fromkeys(_OTHER_HUBS, "only the Hugging Face hub (hf_hub_url) and local files (file_name) are read"),
}
_REFUSED_COLUMNS = {
    **dict.fromkeys(("images", "videos", "audios"), "only text is trained on"),
    **dict.fromkeys(("chosen", "rejected", "kto_tag"), "preference data needs the stages rm, dpo or kto"),
}


@dataclass(frozen=True)
class Columns:
    """Column names; None: not there. ``given`` holds the keys that dataset_info.json names itself."""

    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    messages: str | None = "conversations"
    system: str | None = None
    tools: str | None = None
    given: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Tags:
    """How a message names its role and its content, and what the roles are called."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"


_OPENAI_TAGS = Tags("role", "content", "user", "assistant", "tool", "function", "system")


@dataclass(frozen=True)
class DatasetInfo:
    """One entry of dataset_info.json. ``where`` names it in errors; exactly one of path and hub_id is set.

    num_samples: how many rows are drawn; of a dataset to train on with 0 nothing is read
    (`dataflex.data.chosen.with_chosen_data`).
    """

    name: str
    where: str
    path: Path | None = None
    hub_id: str | None = None
    formatting: str = "alpaca"
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    columns: Columns = field(default_factory=Columns)
    tags: Tags = field(default_factory=Tags)


def find_dataset_dir(dataset_dir: str, config_file: Path | None = None) -> Path:
    """`dataset_dir` as it stands (from the working directory), else beside the configuration file."""
    tried = [Path(dataset_dir).expanduser()]
    if config_file is not None and not tried[0].is_absolute():
        tried.append(Path(config_file).parent / tried[0])
    for path in tried:
        if path.is_dir():
            return path
    raise UserError(f"dataset_dir: there is no folder {' or '.join(dict.fromkeys(map(str, tried)))}")


def read_dataset_infos(names: Iterable[str], dataset_dir: Path, key: str = "dataset") -> list[DatasetInfo]:
    """The entries of the datasets that ``key`` asks for; the file's other entries are not looked at."""
    info_file = dataset_dir / INFO_FILE
    entries = read_entries(info_file)
    infos: list[DatasetInfo] = []
    for name in names:
        if name not in entries:
            raise UserError(f"{key}: {_unknown_dataset(name, entries, info_file)}")
        if any(info.name == name for info in infos):
            raise UserError(f"{key}: '{cut(name)}' is named twice")
        infos.append(_parse_entry(name, entries[name], info_file))
    return infos


def _unknown_dataset(name: str, entries: Mapping[str, Any], info_file: Path) -> str:
    text = f"'{cut(name)}' is not in {info_file}{nearest(name, entries)}"
    if Path(name).exists() or (info_file.parent / name).exists():
        return f'{text}; a file is not used by its path: add {{"my_data": {{"file_name": "{cut(name)}"}}}} there'
    return f"{text}; it has {listed(sorted(entries)) or 'no entries'}"


def read_entries(info_file: Path) -> dict[str, Any]:
    if not info_file.is_file():
        raise UserError(f"{info_file}: there is no such file; dataset_dir must hold a {INFO_FILE}")
    try:
        entries = json.loads(info_file.read_bytes().decode("utf-8-sig"), object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        raise UserError(f"{info_file}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{info_file}:{error.lineno}: malformed JSON: {error.msg}") from None
    except UserError as error:
        raise UserError(f"{info_file}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{info_file}: cannot be read: {too_much(error)}") from None
    except OSError as error:
        raise UserError(f"{info_file}: cannot be read: {error.strerror}") from None
    if not isinstance(entries, dict):
        raise UserError(f"{info_file}: expected an object of datasets, got a {type(entries).__name__}")
    return entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UserError(f"'{cut(key)}' is given twice")
        found[key] = value
    return found


def _parse_entry(name: str, entry: Any, info_file: Path) -> DatasetInfo:
    where = f"{info_file}:{cut(name)}"
    if not isinstance(entry, dict):
        raise UserError(f'{where}: expected an object such as {{"file_name": "data.json"}}, got {shown(entry)}')
    has_source = "hf_hub_url" in entry or "file_name" in entry
    for key in entry:
        if key in _REFUSED and not (key in _OTHER_HUBS and has_source):
            raise UserError(f"{where}.{key}: not supported: {_REFUSED[key]}")
        if key not in _KEYS and key not in _OTHER_HUBS:
            hint = f"{nearest(key, _KEYS)}; valid: {', '.join(_KEYS)}"
            if not has_source:
                raise UserError(f"{where}: unknown key '{cut(key)}'{hint}")
            _say_unknown(f"{where}: key '{cut(key)}' is not read{hint}")
    if entry.get("ranking"):
        raise UserError(f"{where}.ranking: not supported: preference data needs the stages rm, dpo or kto")
    if not has_source:
        raise UserError(f"{where}: needs file_name or hf_hub_url")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in FORMATTINGS:
        raise UserError(
            f"{where}.formatting: {shown(formatting)} is not known{nearest(formatting, FORMATTINGS)}; "
            f"valid: {', '.join(FORMATTINGS)}"
        )
    hub_id = _text(entry, "hf_hub_url", where)
    return DatasetInfo(
        name=name,
        where=where,
        hub_id=hub_id,
        path=None if hub_id else _local_path(entry, info_file.parent, where),
        formatting=formatting,
        subset=_text(entry, "subset", where),
        split=_text(entry, "split", where) or "train",
        folder=_text(entry, "folder", where),
        num_samples=_count(entry, "num_samples", where),
        columns=_parse_columns(entry.get("columns") or {}, formatting, f"{where}.columns"),
        tags=_parse_tags(entry.get("tags") or {}, formatting, f"{where}.tags"),
    )


@cache
def _say_unknown(text: str) -> None:
    """Once, although a run reads the file for each kind of its data."""
    logger.warning(text)


def _local_path(entry: Mapping[str, Any], dataset_dir: Path, where: str) -> Path:
    for key in ("subset", "folder"):
        if entry.get(key) is not None:
            raise UserError(f"{where}.{key}: only a dataset of the hub (hf_hub_url) has it")
    if entry.get("split", "train") != "train":
        raise UserError(f"{where}.split: a local file has only 'train'; num_samples or max_samples give a part")
    name = _text(entry, "file_name", where)
    if not name:
        raise UserError(f"{where}.file_name: is empty")
    problem = unusable_path(name)
    if problem:
        raise UserError(f"{where}.file_name: {shown(name)} can be no file: {problem}")
    if os.path.isabs(name):
        return Path(name)
    if os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise UserError(
            f"{where}.file_name: '{name}' leads out of {dataset_dir}; use an absolute path if that is meant"
        )
    return dataset_dir / name


def _parse_columns(given: Any, formatting: str, where: str) -> Columns:
    valid = [f.name for f in fields(Columns) if f.name != "given"]
    _check_mapping(given, valid, _REFUSED_COLUMNS, where)
    defaults = Columns(messages="messages") if formatting == "openai" else Columns()
    named = {key: given[key] for key in given if key in valid and given[key]}
    if given:  # where columns are named, one that is not named is not read; those that a stage needs keep their names
        defaults = replace(defaults, query=None)
    absent = {key: None for key in given if key in valid and not given[key]}
    return replace(defaults, **absent, **named, given=frozenset(named))


def _parse_tags(given: Any, formatting: str, where: str) -> Tags:
    _check_mapping(given, [f.name for f in fields(Tags)], {}, where)
    defaults = _OPENAI_TAGS if formatting == "openai" else Tags()
    tags = replace(defaults, **{key: value for key, value in given.items() if value})
    roles = [tags.user_tag, tags.assistant_tag, tags.observation_tag, tags.function_tag, tags.system_tag]
    if len(set(roles)) != len(roles):
        raise UserError(f"{where}: two roles have the same tag: {', '.join(roles)}")
    return tags


def _check_mapping(given: Any, valid: list[str], refused: Mapping[str, str], where: str) -> None:
    if not isinstance(given, dict):
        raise UserError(f"{where}: expected an object, got {shown(given)}")
    for key, value in given.items():
        if key in refused:
            if value:
                raise UserError(f"{where}.{key}: not supported: {refused[key]}")
        elif key not in valid:
            raise UserError(f"{where}: unknown key '{cut(key)}'{nearest(key, valid)}; valid: {', '.join(valid)}")
        elif value not in (None, "") and not isinstance(value, str):
            raise UserError(f"{where}.{key}: expected a name, got {shown(value)}")


def _text(entry: Mapping[str, Any], key: str, where: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}.{key}: expected text, got {shown(value)}")
    return value


def _count(entry: Mapping[str, Any], key: str, where: str) -> int | None:
    value = entry.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise UserError(f"{where}.{key}: expected a whole number >= 0, got {shown(value)}")
    return value
