"""`select` from neighbours and probabilities that lie in .npy files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dataflex.config import Config
from dataflex.config.schema import DataSection, OutputSection
from dataflex.config.sections.score import ScoreSection
from dataflex.data.chosen import read_chosen
from dataflex.driver.index_files import drawn, in_turn
from dataflex.driver.selecting import select
from dataflex.utils.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """data/ with a (4 rows) and b (two files of 2 and 1 rows)."""
    data = tmp_path / "data"
    (data / "b").mkdir(parents=True)
    (data / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "a.json"}, "b": {"file_name": "b"}}))
    (data / "a.json").write_text(json.dumps([{"instruction": f"a{i}", "output": "x"} for i in range(4)]))
    (data / "b/one.jsonl").write_text("".join(json.dumps({"instruction": f"b{i}"}) + "\n" for i in range(2)))
    (data / "b/two.jsonl").write_text(json.dumps({"instruction": "b2"}) + "\n")
    return tmp_path


def config(root: Path, array: Any, count: int, name: str = "file.npy", **score: Any) -> Config:
    np.save(root / name, np.array(array))
    return Config(
        data=DataSection(dataset_dir=str(root / "data"), dataset=("a", "b")),
        output=OutputSection(output_dir=str(root / "chosen")),
        score=ScoreSection(**{"select_from": (str(root / name),), "select_count": count, **score}),
    )


def texts(root: Path, name: str) -> list[str]:
    lines = (root / f"chosen/selected/{name}.jsonl").read_text().splitlines()
    return [json.loads(line)["instruction"] for line in lines]


def test_targets_take_turns_with_their_nearest(root: Path) -> None:
    # Round 1: 5, then 5 again (taken), then 0. Round 2: 1, 6, 5 (taken). Round 3 is not reached.
    select(config(root, [[5, 1, 2], [5, 6, 3], [0, 5, 1]], 4))
    assert texts(root, "a") == ["a0", "a1"] and texts(root, "b") == ["b1", "b2"]
    table = pd.read_parquet(root / "chosen/selected/scores.parquet")
    assert table["score"].fillna(-9).tolist() == [0, -1, -2, -2, -9, 0, -1]
    assert table["picked"].tolist() == [True, True, False, False, False, True, True]
    chosen = read_chosen(root / "chosen/selected")
    assert chosen is not None and (chosen.aggregate, chosen.picked) == ("round_robin", {"a": 2, "b": 2})


def test_draws_are_seeded_and_follow_the_probabilities(root: Path) -> None:
    cfg = config(root, [0.5, 0, 0, 0, 0.25, 0.25, 0], 4000)
    cfg = cfg.model_copy(update={"score": cfg.score.model_copy(update={"select_count": None, "select_fraction": 1.0})})
    select(cfg)
    table = pd.read_parquet(root / "chosen/selected/scores.parquet")
    assert table["picked"].sum() == 7 and table["picked"][[1, 2, 3, 6]].sum() == 0
    assert len(texts(root, "a")) + len(texts(root, "b")) == 7  # a row that is drawn twice is there twice
    first = table["picked"].tolist()
    select(cfg)
    assert pd.read_parquet(root / "chosen/selected/scores.parquet")["picked"].tolist() == first
    probabilities = np.array([0.5, 0, 0, 0, 0.25, 0.25, 0])
    picks = drawn(probabilities, 40000, seed=1)
    assert np.bincount(picks, minlength=7) / 40000 == pytest.approx(probabilities, abs=0.01)
    assert (picks == drawn(probabilities, 40000, seed=1)).all() and (picks != drawn(probabilities, 40000, seed=2)).any()


def test_each_turn_is_a_loop_over_ranks_and_targets() -> None:
    draw = np.random.default_rng(0)
    lists = np.stack([draw.permutation(300)[:40] for _ in range(20)])
    taken: list[int] = []
    for rank in range(40):
        for target in range(20):
            if lists[target, rank] not in taken and len(taken) < 150:
                taken.append(int(lists[target, rank]))
    assert in_turn(lists, 150, Path("top_indices.npy")).tolist() == taken


WRONG: list[tuple[Any, int, dict[str, Any], str]] = [
    ([[0, 7]], 1, {}, ".*file.npy: has the sample id 7; valid: 0 to 6, "),
    ([[0, -1]], 1, {}, ".*file.npy: has the sample id -1; valid: 0 to 6, "),
    (
        [[0, 1], [1, 0]],
        3,
        {},
        "select_count: 3 samples are asked for, .*file.npy names 2 different ones; ask",
    ),
    ([0.5, 0.5], 1, {}, ".*file.npy: has 2 probabilities; valid: one for each of 7 samples$"),
    ([1.0] * 7, 1, {}, ".*file.npy: the probabilities sum to 7; valid: 1$"),
    ([2.0, -1.0, 0, 0, 0, 0, 0], 1, {}, ".*file.npy: the probability of sample 1 is -1.0; valid: numbers >= 0$"),
    ([np.nan] * 7, 1, {}, ".*file.npy: the probability of sample 0 is nan; valid: numbers >= 0$"),
    ([1, 2, 3], 1, {}, r".*file.npy: holds int64 \(3,\); valid: float \[samples\]$"),
    ([[[0]]], 1, {}, r"select_from: .*file.npy: int64 \[1, 1, 1\] is neither neighbours .* nor probabilities"),
    ([[0, 1]], 8, {}, "select_count: 8 samples are asked for, 7 are scored"),
    ([[0, 1]], 1, {"select_quotas": "equal"}, "select_quotas: is of scores, and .*file.npy says itself who is taken; "),
    ([[0, 1]], 1, {"select_from": ("file.npy", "x")}, "select_from: file.npy cannot be summed with other scores; give"),
    ([[0, 1]], 1, {"select_from": ("no.npy",)}, "select_from: no.npy cannot be read as a .npy file: "),
]


@pytest.mark.parametrize(("array", "count", "keys", "text"), WRONG)
def test_wrong_files_are_one_line(root: Path, array: Any, count: int, keys: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=f"^{text}") as error:
        select(config(root, array, count, **keys))
    assert "\n" not in str(error.value)
