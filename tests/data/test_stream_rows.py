"""Rows of streams: read on from any row, in chunks that are permutations, pass after pass."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataflex.data.sources.convert import Converter
from dataflex.data.sources.info import DatasetInfo, read_dataset_infos
from dataflex.data.sources.read import FILE_TYPES, Cursor, read_rows
from dataflex.data.streams.stream_rows import Chunks, FileRows, HubRows
from dataflex.utils.errors import UserError
from tests.data.helpers import numbered

Add = Callable[..., Path]
ROWS = [{"instruction": f"line one\nline ü{i}", "output": f"{i}"} for i in range(7)]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    """``rows`` as a file of the suffix's type; tables in row groups and batches of 3."""
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.Table.from_pylist(rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=3)
    elif path.suffix == ".txt":
        path.write_text("".join(f"{row['text']}\n" for row in rows), encoding="utf-8")
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return path


@pytest.mark.parametrize("suffix", FILE_TYPES)
def test_a_file_is_read_on_from_every_row(tmp_path: Path, suffix: str) -> None:
    rows = ROWS if suffix != ".txt" else [{"text": f"line ü{i}"} for i in range(7)]
    path = write(tmp_path / f"x{suffix}", rows)
    whole = list(read_rows(path, rows[0]))
    assert [row for _, row in whole] == rows
    for done in range(len(rows) + 1):
        cursor = Cursor()
        assert list(islice(read_rows(path, rows[0], cursor), done)) == whole[:done]
        assert list(read_rows(path, rows[0], Cursor(**vars(cursor)))) == whole[done:]


def test_what_lies_before_is_not_read_again(tmp_path: Path) -> None:
    """Spoilt bytes before the place where reading goes on do no harm, so they were not looked at."""
    for suffix, spoilt in ((".jsonl", b"\xff{"), (".csv", b"\xff\xff")):
        path, cursor = write(tmp_path / f"x{suffix}", ROWS), Cursor()
        list(islice(read_rows(path, ROWS[0], cursor), 4))
        header = path.read_bytes().index(b"\n") + 1 if suffix == ".csv" else 0
        data = bytearray(path.read_bytes())
        data[header + 3 : header + 5] = spoilt
        path.write_bytes(bytes(data))
        assert [row for _, row in read_rows(path, ROWS[0], cursor)] == ROWS[4:]
        with pytest.raises(UserError, match="not UTF-8"):
            list(read_rows(path, ROWS[0]))


def info_of(add: Add, data_dir: Path, **entry: Any) -> DatasetInfo:
    add("x", None, **entry)
    return read_dataset_infos(["x"], data_dir)[0]


def chunks_of(info: DatasetInfo, size: int, most: int | None = None, seed: int = 1) -> Chunks:
    converter = Converter(info, "sft")
    source = HubRows(info, converter) if info.hub_id else FileRows(info, converter, seed, most is None)
    return Chunks(source, info, seed, size, most)


def answers(rows: list[dict[str, Any]]) -> list[str]:
    return [row["turns"][-1]["content"] for row in rows]


@pytest.fixture
def files(add: Add, data_dir: Path) -> DatasetInfo:
    """A folder of three files, rows 0 to 16."""
    (data_dir / "many").mkdir()
    rows = numbered(17)
    for name, part in (("a.jsonl", rows[:5]), ("b.jsonl", rows[5:11]), ("c.jsonl", rows[11:])):
        write(data_dir / "many" / name, part)
    return info_of(add, data_dir, file_name="many")


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 20), most=st.none() | st.integers(1, 20), seed=st.integers(0, 9))
def test_every_pass_holds_every_row_once(files: DatasetInfo, size: int, most: int | None, seed: int) -> None:
    chunks = chunks_of(files, size, most, seed)
    found: dict[int, list[str]] = {}
    while chunks.epoch < 3:
        chunk = answers(next(chunks))
        assert len(chunk) <= size
        found.setdefault(chunks.epoch, []).extend(chunk)
    rows = Counter(str(i) for i in range(min(17, most or 17)))
    assert all(Counter(found[epoch]) == rows for epoch in range(3))


def test_chunks_are_shuffled_and_so_are_files_anew_in_each_pass(files: DatasetInfo) -> None:
    chunks = chunks_of(files, 17)
    passes = [answers(next(chunks)) for _ in range(3)]
    assert len({tuple(one) for one in passes}) == 3 and sorted(passes[0], key=int) not in passes
    fixed = chunks_of(files, 17, most=17)  # so the files keep their order
    assert len({tuple(answers(next(fixed))) for _ in range(3)}) == 3, "a chunk has another order in each pass"
    small = chunks_of(files, 5)
    first = {frozenset(answers(next(small))) for _ in range(40) if small.epoch < 8}
    assert len(first) > 8, "the files come in another order in other passes, so chunks hold other rows"
    assert answers(next(chunks_of(files, 17))) == passes[0]
    assert answers(next(chunks_of(files, 17, seed=2))) != passes[0]


@pytest.mark.parametrize("hub", [False, True])
def test_a_chunk_is_read_again_from_its_state(add: Add, data_dir: Path, files: DatasetInfo, hub: bool) -> None:
    info = info_of(add, data_dir, hf_hub_url=str(data_dir / "many")) if hub else files
    chunks, made = chunks_of(info, 4), []
    for _ in range(9):
        made.append((answers(next(chunks)), chunks.epoch, json.loads(json.dumps(chunks.state_dict()))))
    assert made[-1][1] == 1, "the states are of two passes"
    for place, (_, _, state) in enumerate(made):
        again = chunks_of(info, 4)
        next(again)
        again.load_state_dict(state)
        assert [(answers(next(again)), again.epoch) for _ in made[place:]] == [one[:2] for one in made[place:]]


def test_a_resume_reads_the_chunk_and_no_row_before_it(files: DatasetInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = chunks_of(files, 4, most=17)
    states = [(next(chunks), chunks.state_dict())[1] for _ in range(4)]
    fresh, read = chunks_of(files, 4, most=17), []
    convert = Converter.__call__
    monkeypatch.setattr(Converter, "__call__", lambda self, row, where: read.append(where) or convert(self, row, where))
    fresh.load_state_dict(states[3])
    next(fresh)
    assert [where.rsplit("/", 1)[1] for where in read] == ["c.jsonl:3", "c.jsonl:5", "c.jsonl:7", "c.jsonl:9"]


def test_dropped_rows_are_said_when_they_double(add: Add, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | ({"output": ""} if i % 3 == 0 else {}) for i, row in enumerate(numbered(90))]
    add("x", rows)
    chunks = chunks_of(read_dataset_infos(["x"], data_dir)[0], 9)
    kept = [answer for _ in range(10) for answer in answers(next(chunks))]
    assert len(kept) == 60 and not {int(answer) % 3 for answer in kept} & {0}
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].split(" rows")[0].strip() for line in said] == [
        "3 of 9",
        "6 of 18",
        "12 of 36",
        "24 of 72",
    ]
    assert said[0] == "x: 3 of 9 rows read so far dropped: 3 no answer (x.json:1, x.json:4, x.json:7)"


@pytest.mark.parametrize(
    ("rows", "entry", "text"),
    [
        ([{"instruction": "q", "output": ""}] * 9, {}, "x: none of its first 4 rows can be used: 4 no answer"),
        ([{"question": "q", "output": "a"}] * 9, {}, r"x.json: no column 'instruction'.*; it has question, output"),
        ([*numbered(5), {"instruction": 5, "output": "a"}], {}, r"x.json:6: instruction: expected text, got int 5"),
        (numbered(6) + [["no object"]], {}, r"x.json:7: a row must be an object"),
        ([], {}, "x.json: the file holds no rows"),
    ],
)
def test_a_bad_row_stops_with_its_place_when_it_is_come_to(
    add: Add, data_dir: Path, rows: list[Any], entry: dict[str, Any], text: str
) -> None:
    add("x", rows, **entry)
    chunks = chunks_of(read_dataset_infos(["x"], data_dir)[0], 4)
    with pytest.raises(UserError, match=text):
        for _ in range(2):
            next(chunks)


def test_a_hub_dataset_is_checked_and_names_its_rows(add: Add, data_dir: Path) -> None:
    (data_dir / "hub").mkdir()
    write(data_dir / "hub" / "train.jsonl", numbered(3))
    with pytest.raises(UserError, match=r"x: no column 'response'"):
        chunks_of(info_of(add, data_dir, hf_hub_url=str(data_dir / "hub"), columns={"response": "response"}), 4)
    (data_dir / "hub" / "train.jsonl").write_text('{"instruction": "q", "output": 3}\n')
    with pytest.raises(UserError, match=r"hub:1: output: expected text, got int 3"):
        next(chunks_of(info_of(add, data_dir, hf_hub_url=str(data_dir / "hub")), 4))
    (data_dir / "hub" / "train.jsonl").write_text('{"instruction": "q", "output": "a"}\n{"instruction": \n')
    with pytest.raises(UserError, match=r"cannot be loaded: |unreadable after row \d"):
        next(chunks_of(info_of(add, data_dir, hf_hub_url=str(data_dir / "hub")), 4))
