"""dataset_info.json: defaults, what is refused, and the text of every error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dataflex.data.sources.info import Columns, DatasetInfo, Tags, find_dataset_dir, read_dataset_infos
from dataflex.utils.errors import UserError


def parse(data_dir: Path, entry: Any, name: str = "x") -> DatasetInfo:
    (data_dir / "dataset_info.json").write_text(json.dumps({"x": entry}))
    return read_dataset_infos([name], data_dir)[0]


def test_defaults_stay_where_a_key_is_not_given(data_dir: Path) -> None:
    info = parse(data_dir, {"file_name": "a.json", "columns": {"prompt": "q"}, "tags": {"user_tag": "me"}})
    assert info.path == data_dir / "a.json"
    assert info.columns == Columns(prompt="q", query=None, given=frozenset({"prompt"}))
    assert info.tags == Tags(user_tag="me")
    assert (info.formatting, info.split, info.num_samples) == ("alpaca", "train", None)


def test_openai_has_its_own_defaults(data_dir: Path) -> None:
    info = parse(data_dir, {"file_name": "a.json", "formatting": "openai"})
    assert info.columns.messages == "messages"
    assert (info.tags.role_tag, info.tags.user_tag, info.tags.observation_tag) == ("role", "user", "tool")


def test_a_column_set_to_null_is_not_there(data_dir: Path) -> None:
    info = parse(data_dir, {"file_name": "a.json", "columns": {"query": None, "images": None}})
    assert info.columns.query is None and "query" not in info.columns.given


def test_an_empty_column_is_not_there_and_where_columns_are_named_no_other_is_read(data_dir: Path) -> None:
    named = {"prompt": "instruction", "response": "output"}
    for columns in (named, named | {"query": ""}, named | {"query": None, "tools": ""}):
        columns = parse(data_dir, {"file_name": "a.json", "columns": columns}).columns
        assert (columns.prompt, columns.query, columns.response) == ("instruction", None, "output")
    assert parse(data_dir, {"file_name": "a.json"}).columns.query == "input"
    assert parse(data_dir, {"file_name": "a.json", "columns": {}}).columns.query == "input"


def test_what_an_entry_has_besides_is_said_once(data_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert parse(data_dir, {"file_name": "a.json", "file_sha1": "x"}).path == data_dir / "a.json"
    assert capfd.readouterr().err.count("x: key 'file_sha1' is not read") == 1


def test_hub_entry(data_dir: Path) -> None:
    entry = {"hf_hub_url": "a/b", "ms_hub_url": "c/d", "subset": "s", "split": "test", "folder": "f"}
    info = parse(data_dir, entry)
    assert (info.hub_id, info.path, info.subset, info.split, info.folder) == ("a/b", None, "s", "test", "f")


def test_an_absolute_path_is_on_purpose(data_dir: Path) -> None:
    assert parse(data_dir, {"file_name": "/elsewhere/a.json"}).path == Path("/elsewhere/a.json")
    assert parse(data_dir, {"file_name": "sub/../a.json"}).path == data_dir / "sub/../a.json"


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"file_nam": "a.json"}, "dataset_info.json:x: unknown key 'file_nam' (did you mean 'file_name'?)"),
        ({"script_url": "a"}, "x.script_url: not supported: loading scripts are foreign code"),
        ({"ms_hub_url": "a"}, "x.ms_hub_url: not supported: only the Hugging Face hub"),
        ({"file_name": "a.json", "ranking": True}, "x.ranking: not supported: preference data"),
        ({"file_name": "a.json", "columns": {"images": "i"}}, "columns.images: not supported: only text"),
        ({"file_name": "a.json", "columns": {"videos": "i"}}, "columns.videos: not supported: only text"),
        ({"file_name": "a.json", "columns": {"audios": "i"}}, "columns.audios: not supported: only text"),
        ({"file_name": "a.json", "columns": {"chosen": "t"}}, "columns.chosen: not supported: preference"),
        ({"file_name": "a.json", "columns": {"promt": "t"}}, "unknown key 'promt' (did you mean 'prompt'?)"),
        ({"file_name": "a.json", "columns": {"prompt": 3}}, "columns.prompt: expected a name, got 3"),
        ({"file_name": "a.json", "tags": {"usr_tag": "t"}}, "'usr_tag' (did you mean 'user_tag'?)"),
        ({"file_name": "a.json", "tags": {"user_tag": "gpt"}}, "tags: two roles have the same tag"),
        ({"file_name": "a.json", "formatting": "alpacca"}, "(did you mean 'alpaca'?); valid: alpaca, "),
        ({"file_name": "a.json", "num_samples": -1}, "num_samples: expected a whole number >= 0, got -1"),
        ({"file_name": "a.json", "subset": "s"}, "x.subset: only a dataset of the hub"),
        ({"file_name": "a.json", "split": "test"}, "x.split: a local file has only 'train'"),
        ({"file_name": "../a.json"}, "x.file_name: '../a.json' leads out of"),
        ({"file_name": "b/../../a.json"}, "leads out of"),
        ({"formatting": "alpaca"}, "x: needs file_name or hf_hub_url"),
        ("a.json", 'x: expected an object such as {"file_name"'),
    ],
)
def test_bad_entries(data_dir: Path, entry: Any, text: str) -> None:
    with pytest.raises(UserError) as error:
        parse(data_dir, entry)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_only_the_entries_asked_for_are_looked_at(data_dir: Path) -> None:
    entries = {"good": {"file_name": "a.json"}, "bad": {"script_url": "s"}}
    (data_dir / "dataset_info.json").write_text(json.dumps(entries))
    assert [info.name for info in read_dataset_infos(["good"], data_dir)] == ["good"]


def test_unknown_name_offers_the_nearest(data_dir: Path) -> None:
    with pytest.raises(UserError, match=r"'gsm8' is not in .*dataset_info.json \(did you mean 'gsm8k'\?\)"):
        (data_dir / "dataset_info.json").write_text('{"gsm8k": {"file_name": "a.json"}}')
        read_dataset_infos(["gsm8"], data_dir)


def test_a_file_is_no_dataset_name(data_dir: Path) -> None:
    (data_dir / "rows.json").write_text("[]")
    with pytest.raises(UserError, match="a file is not used by its path: add"):
        parse(data_dir, {"file_name": "rows.json"}, name="rows.json")


def test_a_name_twice(data_dir: Path) -> None:
    (data_dir / "dataset_info.json").write_text('{"x": {"file_name": "a.json"}}')
    with pytest.raises(UserError, match="'x' is named twice"):
        read_dataset_infos(["x", "x"], data_dir)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"x": \n {,}}', "dataset_info.json:2: malformed JSON"),
        (b'{"x": {}, "x": {}}', "dataset_info.json: 'x' is given twice"),
        (b'{"\xff": {}}', "dataset_info.json: not UTF-8 at byte 2"),
        (b"[]", "dataset_info.json: expected an object of datasets, got a list"),
        (None, "dataset_info.json: there is no such file; dataset_dir must hold a dataset_info.json"),
    ],
)
def test_bad_info_files(data_dir: Path, content: bytes | None, text: str) -> None:
    if content is not None:
        (data_dir / "dataset_info.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_dataset_infos(["x"], data_dir)
    assert text in str(error.value)


def test_dataset_dir_is_found_beside_the_configuration(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_dataset_dir("data", tmp_path / "run.yaml") == data_dir
    with pytest.raises(UserError, match="dataset_dir: there is no folder nowhere or .*nowhere"):
        find_dataset_dir("nowhere", tmp_path / "run.yaml")
    monkeypatch.chdir(tmp_path)
    assert find_dataset_dir("data") == Path("data")
