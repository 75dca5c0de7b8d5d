"""The table of a decision: every sample, where it was read, its score and rank, and whether it was picked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from dataflex.data.pool import Pool
from dataflex.data.sources.origin import Origin
from dataflex.report import decision_table as tables
from dataflex.utils.errors import UserError

ORIGINS = [Origin(("a.json",), np.array([0]), "aa"), Origin(("x.jsonl", "y.jsonl"), np.array([0, 3]), "bb")]
POOL = Pool(
    range(5),
    np.array([0, 0, 1, 1, 1]),
    ["maths", "poems"],
    np.ones(5),
    fingerprint="f00d",
    rows=np.array([1, 4, 2, 3, 7]),
    origins=ORIGINS,
)
NAN = float("nan")


def written(path: Path, scored: dict[str, np.ndarray], picks: list[int], replacement: bool = False) -> Path:
    columns = [
        *tables.pool_columns(POOL),
        *tables.score_columns(scored, 5, "selector 'x'"),
        tables.picked_column(np.array(picks), 5, replacement),
    ]
    tables.write_table(path, columns, 5, tables.Facts(4, "x", 4, tables.contents_of(POOL)))
    return path


def test_every_sample_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROW_GROUP", 2)
    scored = {"score": np.array([0.5, NAN, 0.5, 2.0, -1.0], dtype=np.float32), "cluster": np.array([3, 1, 4, 1, 5])}
    path = written(tmp_path / "new/step_4.parquet", scored, [3, 0])
    frame = pd.read_parquet(path)
    assert list(frame.columns) == ["sample_id", "dataset", "file", "row", "score", "rank", "cluster", "picked"]
    assert frame.sample_id.tolist() == [0, 1, 2, 3, 4]
    assert frame.dataset.tolist() == ["maths", "maths", "poems", "poems", "poems"]
    assert frame.file.tolist() == ["a.json", "a.json", "x.jsonl", "y.jsonl", "y.jsonl"]
    assert frame.row.tolist() == [1, 4, 2, 0, 4]
    assert frame.score.fillna(9).tolist() == [0.5, 9, 0.5, 2.0, -1.0]
    assert frame["rank"].fillna(9).tolist() == [2, 9, 2, 1, 4], "equal scores have the same rank"
    assert frame.cluster.tolist() == [3, 1, 4, 1, 5]
    assert frame.picked.tolist() == [True, False, False, True, False]
    file = pq.ParquetFile(path)
    assert file.num_row_groups == 3
    assert [str(t) for t in file.schema_arrow.types] == [
        "int64", "string", "string", "int64", "double", "int64", "int64", "bool"
    ]  # fmt: skip
    facts = json.loads(file.schema_arrow.metadata[tables.FACTS])
    assert facts == {"step": 4, "component": "x", "scored": 4, "contents": {"maths": "aa", "poems": "bb"}}
    assert [p.name for p in path.parent.iterdir()] == ["step_4.parquet"]


def test_without_scores_the_columns_are_empty_and_repeats_are_counted(tmp_path: Path) -> None:
    frame = pd.read_parquet(written(tmp_path / "t.parquet", {}, [3, 3, 0], replacement=True))
    assert frame.score.isna().all() and frame["rank"].isna().all()
    assert frame.picked.tolist() == [1, 0, 0, 2, 0]


def test_the_same_decision_is_the_same_file(tmp_path: Path) -> None:
    scored = {"score": np.arange(5.0)}
    first, second = (written(tmp_path / name, scored, [1]).read_bytes() for name in ("a.parquet", "b.parquet"))
    assert first == second


def test_scores_of_another_number_of_samples_are_refused() -> None:
    with pytest.raises(UserError, match=r"selector 'x' at step 2: scored\['score'\]: expected 5 values, got shape \(4"):
        tables.score_columns({"score": np.zeros(4)}, 5, "selector 'x' at step 2")


def test_packed_blocks_and_objects_have_no_file(tmp_path: Path) -> None:
    blocks = Pool(range(2), np.zeros(2), ["text"], np.ones(2), fingerprint="f", origins=[ORIGINS[0]])
    own = Pool.from_datasets(
        {"a": [{"input_ids": [1, 2], "labels": [1, 2]}] * 2, "b": [{"input_ids": [1, 2], "labels": [1, 2]}]}
    )
    for pool, rows in ((blocks, [None, None]), (own, [0, 1, 0])):
        tables.write_table(tmp_path / "t.parquet", tables.pool_columns(pool), len(pool), tables.Facts(0, "x", 0, {}))
        table = pq.read_table(tmp_path / "t.parquet")
        assert table["row"].to_pylist() == rows
        assert table["file"].to_pylist() == [None] * len(rows)
