"""Every file type gives the same rows; every kind of broken file names the file and the row."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from dataflex.config import Config
from dataflex.data.load import LoadedData
from dataflex.data.sources.convert import Converter
from dataflex.data.sources.info import read_dataset_infos
from dataflex.data.sources.read import _parquet_batches, column_names, list_files, read_rows
from dataflex.utils.errors import UserError
from tests.data.conftest import ROWS
from tests.data.helpers import load
from tests.tiny import byte_tokenizer

Add = Callable[..., Path]
MakeConfig = Callable[..., Config]


def write_rows(path: Path, rows: list[dict[str, str]] = ROWS) -> None:
    """The rows in the format that the name ends in; `.ipc.arrow` is Arrow's file format, not its stream."""
    if path.name.endswith((".parquet", ".arrow")):
        table = pa.Table.from_pylist(rows)
        if path.suffix == ".parquet":
            pa.parquet.write_table(table, path, row_group_size=2)
            return
        kind = pa.ipc.new_file if path.name.endswith(".ipc.arrow") else pa.ipc.new_stream
        with kind(path, table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def texts(loaded: LoadedData) -> list[str]:
    tokenizer = byte_tokenizer()
    return [tokenizer.decode(loaded.train[i]["input_ids"]) for i in range(len(loaded.train))]


EXPECTED = [
    "Human: Add.\n1 and 2</s>\nAssistant:3</s>",
    "Human: Say hello.</s>\nAssistant:hello</s>",
    "Human: Größe?</s>\nAssistant:1,5 m</s>",
]


@pytest.mark.parametrize("file", ["x.json", "x.jsonl", "x.csv", "x.parquet", "x.arrow", "x.ipc.arrow"])
def test_every_file_type(add: Add, config: MakeConfig, file: str) -> None:
    write_rows(add("x", None, file))
    assert texts(load(config("x"))) == EXPECTED


def test_one_object_a_line_in_a_json_file_with_a_byte_order_mark(add: Add, config: MakeConfig) -> None:
    add("x", b"\xef\xbb\xbf" + "\n".join(json.dumps(row) for row in ROWS).encode())
    assert texts(load(config("x"))) == EXPECTED


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_a_folder_is_read_in_the_order_of_its_names(
    add: Add, config: MakeConfig, data_dir: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (data_dir / "many").mkdir()
    write_rows(data_dir / "many" / f"b.{suffix}", ROWS[2:])
    write_rows(data_dir / "many" / f"a.{suffix}", ROWS[:2])
    (data_dir / "many" / ".hidden").write_text("")
    (data_dir / "many" / "README.md").write_text("what this is")
    add("x", file_name="many")
    assert texts(load(config("x"))) == EXPECTED
    assert "many: not read: README.md" in capsys.readouterr().err


def test_a_folder_that_datasets_saved(add: Add, config: MakeConfig, data_dir: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(data_dir / "saved")
    add("x", file_name="saved")
    assert texts(load(config("x"))) == EXPECTED


def test_a_hub_dataset_goes_through_datasets(add: Add, config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    write_rows(tmp_path / "hub" / "train.jsonl")
    add("x", None, hf_hub_url=str(tmp_path / "hub"))
    assert texts(load(config("x"))) == EXPECTED


def test_a_hub_dataset_that_cannot_be_had(add: Add, config: MakeConfig) -> None:
    add("x", None, hf_hub_url="nobody/nothing-of-this-name")
    with pytest.raises(UserError, match="x.hf_hub_url: 'nobody/nothing-of-this-name' cannot be loaded: "):
        load(config("x"))


def test_types_that_arrow_would_merge_or_choke_on(add: Add, config: MakeConfig) -> None:
    last = {"instruction": "Größe?", "output": "1,5 m"}
    rows = [{**ROWS[0], "extra": 1}, {**ROWS[1], "extra": {"a": []}}, last]
    add("x", "\n".join(json.dumps(row) for row in rows), "x.jsonl")
    assert texts(load(config("x"))) == EXPECTED


GOOD = json.dumps(ROWS[0]).encode()
BAD_FILES = {
    "empty json": ("x.json", b"", "x.json: the file is empty"),
    "empty csv": ("x.csv", b"", "x.csv: the file is empty"),
    "empty list": ("x.json", b"[ ]", "x.json: the file holds no rows"),
    "only blank lines": ("x.jsonl", b"\n\n", "x.jsonl: the file holds no rows"),
    "csv without rows": ("x.csv", b"instruction,output\n", "x.csv: the file holds no rows"),
    "broken jsonl": ("x.jsonl", GOOD + b"\n\n{oops}\n", "x.jsonl:3: malformed JSON at column 2"),
    "broken list": ("x.json", b"[\n" + GOOD + b",\n{oops}]", "x.json:2: malformed JSON in line 3, column 2"),
    "no comma": ("x.json", b"[" + GOOD + b" " + GOOD + b"]", "x.json:1: malformed JSON in line 1"),
    "comma at the end": ("x.json", b"[" + GOOD + b",]", "a comma before the closing bracket"),
    "list that stops": ("x.json", b"[" + GOOD + b",", "x.json:2: malformed JSON in line 1"),
    "text after the list": ("x.json", b"[" + GOOD + b"]\n{}", "more text after the list that ends in line 1"),
    "one object": ("x.json", b'{\n"data": []\n}', "x.json:1: malformed JSON at column"),
    "row is a list": ("x.json", b"[" + GOOD + b", [1]]", "x.json:2: a row must be an object"),
    "row is a text": ("x.jsonl", GOOD + b'\n"hi"\n', "x.jsonl:2: a row must be an object"),
    "latin-1": (
        "x.jsonl",
        GOOD + b'\n{"instruction": "Gr\xf6\xdfe", "output": "1"}\n',
        f"x.jsonl:2: not UTF-8: byte 0xf6 at offset {len(GOOD) + 1 + 19}",
    ),
    "latin-1 in a list": ("x.json", b"[" + GOOD + b",\n\xff]", "x.json:2: not UTF-8: byte 0xff at offset"),
    "latin-1 csv": ("x.csv", b"instruction,output\na,b\nc,\xe4\n", "x.csv:3: not UTF-8: byte 0xe4"),
    "utf-16": ("x.json", "[]".encode("utf-16"), "byte 0xff at offset 0 (it looks like UTF-16)"),
    "csv fields": ("x.csv", b"instruction,output\na,b\nc\n", "x.csv:2: 1 fields, but the header has 2"),
    "csv header": ("x.csv", b"output,output\na,b\n", "x.csv: the header names a column twice: output"),
    "csv quote": ("x.csv", b'instruction,output\na,b\nc,"d\n', "x.csv:2: malformed CSV near line 3"),
    "not parquet": ("x.parquet", b"PAR1 not really", "x.parquet: not a readable .parquet file: "),
    "not arrow": ("x.arrow", b"not arrow at all", "x.arrow: not a readable .arrow file: "),
    "unknown type": ("x.xml", b"text", "x.xml: unknown type '.xml'; valid: .json, .jsonl, .csv"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(add: Add, config: MakeConfig, case: str) -> None:
    file, content, text = BAD_FILES[case]
    add("x", content, file)
    with pytest.raises(UserError) as error:
        load(config("x"))
    assert text in str(error.value)
    assert "\n" not in str(error.value)


CALL = {"function": {"name": "f", "arguments": "{}"}}
PARTS = [{"type": "text", "text": "yo"}]
# Rows that JSON allows: (sample_weight, formatting, the row's text, what is told or "" where it is read).
ODD_ROWS: dict[str, tuple[str | None, str, str, str]] = {
    "400 digits": (
        "w",
        "alpaca",
        '{"instruction": "a", "output": "b", "w": 1' + "0" * 400 + "}",
        "x.json:1: w: expected a",
    ),
    "5,000 digits": ("w", "alpaca", '{"instruction": "a", "output": "b", "w": ' + "9" * 5000 + "}", "x.json:1: "),
    "deep nesting": (
        None,
        "alpaca",
        '{"instruction": "a", "output": "b", "x": ' + "[" * 9999 + "]" * 9999 + "}",
        "x.json:1: ",
    ),
    "a call and parts": (None, "openai", json.dumps({"role": "assistant", "content": PARTS, "tool_calls": [CALL]}), ""),
    "a call that is a number": (
        None,
        "openai",
        '{"role": "assistant", "content": "yo", "tool_calls": 1}',
        "messages[1]",
    ),
    "three arguments": ("log(w,2,3)", "alpaca", '{"instruction": "a", "output": "b", "w": 1}', "sample_weight: "),
    "half a surrogate pair": (
        None,
        "alpaca",
        '{"instruction": "\\ud800", "output": "b"}',
        "text with half a surrogate pair",
    ),
}


@pytest.mark.parametrize("case", ODD_ROWS)
def test_odd_rows_are_told_in_one_line(add: Add, config: MakeConfig, case: str) -> None:
    weight, formatting, row, told = ODD_ROWS[case]
    if formatting == "openai":
        row = '{"messages": [{"role": "user", "content": "hi"}, ' + row + "]}"
    add("x", f"[{row}]", formatting=formatting)
    if not told:
        assert "yo" in texts(load(config("x", sample_weight=weight)))[0]
        return
    with pytest.raises(UserError) as error:
        load(config("x", sample_weight=weight))
    assert told in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 2000


def test_half_a_surrogate_pair_in_a_column_that_is_kept_drops_the_row(add: Add, config: MakeConfig) -> None:
    info = read_dataset_infos(["x"], add("x", "[]").parent)[0]
    converter = Converter(info, "sft", kept_column="k")
    made = converter({"instruction": "a", "output": "b", "k": "\ud800"}, "x:1")
    assert (made.turns, made.problem) == ((), "text with half a surrogate pair")


def test_missing_file_and_odd_folders(add: Add, config: MakeConfig, data_dir: Path) -> None:
    add("x", None, "gone.json")
    with pytest.raises(UserError, match="gone.json: there is no such file or folder"):
        load(config("x"))
    (data_dir / "many").mkdir()
    add("y", file_name="many")
    with pytest.raises(UserError, match="many: the folder holds no .json, "):
        load(config("y"))
    write_rows(data_dir / "many" / "a.json")
    write_rows(data_dir / "many" / "b.csv")
    with pytest.raises(UserError, match="many: the folder mixes .csv, .json files"):
        load(config("y"))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "arrow"])
def test_wrong_columns(add: Add, config: MakeConfig, suffix: str) -> None:
    rows = [{"instruction": "a", "outputs": "b"}]
    write_rows(add("x", None, f"x.{suffix}"), rows)
    with pytest.raises(UserError) as error:
        load(config("x"))
    assert (
        f"x.{suffix}: no column 'output' (did you mean 'outputs'?); it has instruction, outputs; "
        "stage sft needs instruction (prompt), output (response)"
    ) in str(error.value)


def test_plain_text_in_stage_sft_is_told_apart(add: Add, config: MakeConfig) -> None:
    add("x", [{"text": "a"}], columns={"prompt": "text"})
    with pytest.raises(UserError, match="plain text is for stage: pt"):
        load(config("x"))


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_a_wrong_type_names_its_row(add: Add, config: MakeConfig, suffix: str) -> None:
    rows = [{"instruction": "a", "output": 4}]
    rows = rows if suffix == "parquet" else [ROWS[0], *rows]
    write_rows(add("x", None, f"x.{suffix}"), rows)
    with pytest.raises(UserError, match=rf"x.{suffix}:{len(rows)}: output: expected text, got int 4"):
        load(config("x"))


def test_every_line_of_a_text_file_is_a_row_of_stage_pt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\nthré e\n".encode())
    assert list(read_rows(tmp_path / "a.txt", ())) == [(1, {"text": "one"}), (2, {"text": ""}), (3, {"text": "thré e"})]
    assert column_names(tmp_path / "a.txt") == ["text"]
    assert list_files(tmp_path) == (tmp_path / "a.txt",)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    assert list_files(tmp_path) == (tmp_path / "b.jsonl",)


@pytest.mark.parametrize(("done", "first"), [(0, 0), (1, 0), (2, 2), (3, 2), (4, 4)])
def test_row_groups_that_were_read_are_left_out(tmp_path: Path, done: int, first: int) -> None:
    path = tmp_path / "x.parquet"
    pa.parquet.write_table(pa.table({"a": list(range(5))}), path, row_group_size=2)
    found = [(before, batch["a"].to_pylist()) for before, batch in _parquet_batches(path, ["a"], done)]
    assert found[0][0] == first and [v for _, values in found for v in values] == list(range(first, 5))
