"""`dataflex-cli show`: a decision as text, from the run folder and the data that it names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from dataflex import cli
from dataflex.data.pool import Pool
from dataflex.data.sources.info import read_dataset_infos
from dataflex.data.sources.origin import Origin
from dataflex.data.sources.rows import content_of
from dataflex.report import decision_table as tables
from dataflex.report.show import _cut, _read, show
from dataflex.utils.errors import UserError

NAN = float("nan")
LONG = "long " * 200


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ (40 rows in two files, 5 in one) and run/ with the decisions of three kinds: scored, random, a mixer's."""
    folder = tmp_path_factory.mktemp("shown")
    (folder / "data/many").mkdir(parents=True)
    rows = [{"instruction": f"question {i}", "output": LONG if i == 3 else f"answer\n{i}"} for i in range(45)]
    for name, part in (("many/a", rows[:25]), ("many/b", rows[25:40]), ("few", rows[40:])):
        (folder / f"data/{name}.json").write_text(json.dumps(part))
    info = {"many": {"file_name": "many"}, "few": {"file_name": "few.json"}}
    (folder / "data/dataset_info.json").write_text(json.dumps(info))
    run, config = (
        folder / "run",
        {"dataset": ["many", "few"], "dataset_dir": str(folder / "data"), "template": "default"},
    )
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"model_name_or_path": "gone", "output_dir": "run"}))
    contents = [content_of(entry) for entry in read_dataset_infos(info, folder / "data")]
    origins = [Origin(("a.json", "b.json"), np.array([0, 25]), contents[0])]
    origins.append(Origin(("few.json",), np.array([0]), contents[1]))
    rows_of = np.concatenate([np.arange(40), np.arange(5)])
    pool = Pool(range(45), np.repeat([0, 1], [40, 5]), list(info), np.ones(45), "f00d", rows=rows_of, origins=origins)
    scores = (np.arange(45) * 7 % 45).astype(np.float32)
    scores[44] = NAN
    for step, scored, picks in ((10, {"score": scores}, [3, 32, 6]), (20, {}, [2, 2, 41])):
        columns = [
            *tables.pool_columns(pool),
            *tables.score_columns(scored, 45, "x"),
            tables.picked_column(np.array(picks), 45, replacement=step == 20),
        ]
        facts = tables.Facts(step, "mine", 44 if scored else 0, tables.contents_of(pool))
        tables.write_table(run / f"decisions/step_{step}.parquet", columns, 45, facts)
        (run / f"decisions/step_{step}.json").write_text(json.dumps({"step": step, "component": "mine", "indices": []}))
    mixed = {"step": 30, "component": "odm", "proportions": {"many": 0.25, "few": 0.75}}
    (run / "decisions/step_30.json").write_text(json.dumps(mixed))
    return folder


def test_the_highest_and_the_lowest_are_printed_as_text(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROW_GROUP", 8)
    lines = show(made / "run", step=10, top=2)
    assert lines[:5] == [
        f"{made}/run: after step 10, mine picked 3 of 45 samples, 44 of them scored",
        "",
        "dataset     samples     of pool      picked    of picks  mean score   of picked",
        "many             40       88.9%           3      100.0%       21.75       35.67",
        "few               5       11.1%           0        0.0%        20.5           -",
    ]
    assert lines[5:19] == [
        "",
        "highest scores:",
        "  rank 1  score 44  picked  many:7 (b.json)  sample 32",
        "    user: question 32",
        "    assistant: answer 32",
        "  rank 2  score 43  not picked  many:19 (a.json)  sample 19",
        "    user: question 19",
        "    assistant: answer 19",
        "",
        "lowest scores:",
        "  rank 44  score 0  not picked  many:0 (a.json)  sample 0",
        "    user: question 0",
        "    assistant: answer 0",
        "  rank 43  score 1  not picked  many:13 (a.json)  sample 13",
    ]
    assert lines[19:21] == ["    user: question 13", "    assistant: answer 13"]
    assert sum(line.startswith("  rank ") for line in lines) == 4, "two of each end"


def test_of_equal_scores_those_that_were_picked_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Votes are few, so that more samples than are shown have the same rank, over several parts of the table."""
    monkeypatch.setattr(tables, "ROW_GROUP", 4)
    pool = Pool(range(12), np.zeros(12, dtype=np.int64), ["many"], np.ones(12), "f00d", rows=np.arange(12))
    votes = np.array([1, 2, 1, 2, 1, 2, 2, 2, 0, 0, 0, 0], dtype=np.float64)
    columns = [
        *tables.pool_columns(pool),
        *tables.score_columns({"score": votes}, 12, "x"),
        tables.picked_column(np.array([7, 5]), 12, False),
    ]
    tables.write_table(tmp_path / "decisions/step_1.parquet", columns, 12, tables.Facts(1, "x", 12, {}))
    (tmp_path / "decisions/step_1.json").write_text(json.dumps({"step": 1, "component": "x", "indices": []}))
    ranks = [line.split() for line in show(tmp_path, top=3) if line.startswith("  rank ")]
    assert [(words[1], words[-1]) for words in ranks] == [
        ("1", "5"), ("1", "7"), ("1", "1"), ("9", "11"), ("9", "10"), ("9", "9")
    ]  # fmt: skip


def test_whom_the_picks_serve(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    path = tmp_path / "run/decisions/step_10.json"
    tasks = {"adding": {"picks": 3, "share": 1.0, "lowest": 0.25, "highest": 0.5, "last": 1 / 3}}
    tasks["sorting"] = {"picks": 0, "share": 0.0}
    record = {"subtasks": tasks, "overlap": {"random": 3 / 45, "last": 1 / 3}}
    path.write_text(json.dumps(json.loads(path.read_text()) | record))
    lines = show(tmp_path / "run", step=10, top=1)
    assert lines[5:11] == [
        "",
        "serves       picked    of picks      lowest     highest     of last",
        "adding            3      100.0%        0.25         0.5       33.3%",
        "sorting           0        0.0%           -           -           -",
        "",
        "of the picks 6.7% would be in a random draw of as many, 33.3% were in the decision before",
    ]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"subtasks": [1]}))
    with pytest.raises(UserError, match="step_10.json: not a record of a decision: "):
        show(tmp_path / "run", step=10)


def test_a_long_text_is_cut(made: Path) -> None:
    lines = show(made / "run", step=10, top=44)
    (line,) = {line for line in lines if "characters left out" in line}
    assert len(line) < 500 and "599 characters left out" in line


def test_text_cannot_steer_the_terminal() -> None:
    assert _cut("a\x1b[2J\n b\x07 c\u202e \u00e9") == "a\ufffd[2J b\ufffd c\ufffd \u00e9"


def test_a_pick_counts_as_often_as_it_was_made(tmp_path: Path) -> None:
    pool = Pool(range(3), np.zeros(3, dtype=np.int64), ["a"], np.ones(3), "f00d")
    columns = [
        *tables.pool_columns(pool),
        *tables.score_columns({"score": np.float32([1, 4, 10])}, 3, "x"),
        tables.picked_column(np.array([0, 0, 1]), 3, replacement=True),
    ]
    (tmp_path / "decisions").mkdir()
    table = tmp_path / "decisions/step_1.parquet"
    tables.write_table(table, columns, 3, tables.Facts(1, "mine", 3, tables.contents_of(pool)))
    counts = _read(table, tables.Facts(1, "mine", 3, tables.contents_of(pool)), 1).by_dataset["a"]
    assert (counts.picked, counts.scored_picks, counts.total_of_picks, counts.total) == (3, 3, 6.0, 15.0)


def test_without_scores_the_first_picks_are_printed(made: Path) -> None:
    lines = show(made / "run", step=20, top=5)
    at = lines.index("mine gives no scores; the first picks:")
    assert lines[at + 1 : at + 5] == [
        "  picked 2 times  many:2 (a.json)  sample 2",
        "    user: question 2",
        "    assistant: answer 2",
        "  picked  few:1 (few.json)  sample 41",
    ]


def test_the_last_decision_is_meant_and_a_mixer_chooses_no_samples(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["show", str(made / "run")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{made}/run: after step 30, odm mixes (it chooses no samples):",
        "  many  25.0%",
        "  few  75.0%",
    ]


def test_what_selection_cost_is_printed(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "run/all_results.json").write_text('{"training_seconds": 9, "selection_seconds": 0.26}')
    for step in (10, 30):
        assert "time: training 9.0 s, selection 0.3 s" in show(tmp_path / "run", step)
    assert not any(line.startswith("time:") for line in show(made / "run", 10)), "the run has no results yet"


def test_changed_or_missing_data_is_said(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "copy")
    run = tmp_path / "copy/run"
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"dataset_dir": str(tmp_path / "copy/data")}))
    with (tmp_path / "copy/data/many/b.json").open("a") as file:
        file.write("\n")
    lines = show(run, step=10, top=1)
    where = f"{tmp_path}/copy/data/dataset_info.json:many"
    assert lines[-1] == f"no texts of 'many': its data has changed since the run read it ({where})"
    assert "  rank 1  score 44  picked  many:7 (b.json)  sample 32" in lines
    shutil.rmtree(tmp_path / "copy/data")
    assert "there is no such file" in show(run, step=10, top=1)[-1]
    (run / "config.yaml").unlink()
    assert show(run, step=10, top=1)[-1] == f"no texts: {run} has no config.yaml, which would name the data"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"step": 40, "proportions": [1]}', b"[" * 99999])
def test_a_damaged_record_is_one_line(made: Path, tmp_path: Path, content: bytes) -> None:
    run = shutil.copytree(made / "run", tmp_path / "run")
    path = run / "decisions/step_40.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: not a record of a decision: "):
        show(run)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["run", "--step", "11"], "--step: {made}/run has no decision after step 11; there are 10, 20, 30"),
        (["run", "--top", "0"], "--top: expected at least 1, got 0"),
        (["nothing"], "{made}/nothing: holds no decisions/step_N.json; a run with a selector or a mixer writes them"),
        (["run", "--step", "40"], "{made}/run/decisions/step_40.parquet: cannot be read: "),
    ],
)
def test_what_cannot_be_shown(made: Path, args: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "40" in args:
        for ending in ("json", "parquet"):
            (made / f"run/decisions/step_40.{ending}").write_text("{}")
    assert cli.main(["show", str(made / args[0]), *args[1:]]) == 2
    assert capsys.readouterr().err.startswith(f"dataflex: error: {text.format(made=made)}")
    for path in (made / "run/decisions").glob("step_40.*"):
        path.unlink()
