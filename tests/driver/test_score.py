"""`dataflex-cli score` and `select`: the same scores as online, rows as they were, and every wrong input's line."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from dataflex.config import Config, load_config
from dataflex.config.sections.score import ScoreSection
from dataflex.driver import scores, scoring, selecting
from dataflex.driver.selecting import select
from dataflex.scoring.kept.store import StoreReader
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger
from dataflex.utils.records import write_sealed
from tests.distributed import run_ranks
from tests.driver.workspace import ZERO3, settings, small
from tests.engine.test_manifest import make

LESS: dict[str, Any] = {
    "deepspeed": ZERO3,
    "eval_dataset": ["target"],
    "train_type": "dynamic_select",
    "component_name": "less",
    "warmup_step": 2,
    "update_step": 12,
    "update_times": 1,
    "max_steps": None,
    "save_steps": 2,
    "score_shard_samples": 24,
    "scoring_batch_tokens": 256,
}


def _cases(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    def keys(name: str, **changes: Any) -> dict[str, Any]:
        return settings(folder, **{**LESS, **small(folder), "output_dir": str(folder / name), **changes})

    checkpoint = {"resume_from_checkpoint": str(folder / "run/checkpoint-2")}
    return {
        "train dry": ("train", keys("dry", dry_run=True)),
        "run": ("train", keys("run", train_step=4)),
        "at 2": ("score", keys("at2", **checkpoint)),
        "at 4": ("score", keys("at4", resume_from_checkpoint=str(folder / "run/checkpoint-4"), keep_features=True)),
        "again": ("score", keys("at4", resume_from_checkpoint=str(folder / "run/checkpoint-4"), keep_features=True)),
        "base": ("score", keys("base", update_step=1000)),  # no step is taken, so no schedule must fit the pool
        "two": ("score", keys("two", eval_dataset=["target", "b"], **checkpoint)),
        "each": (
            "score",
            keys("each", component_params={"select": {"per": "target", "aggregate": "mean"}}, **checkpoint),
        ),
        "held out": ("score", keys("held", val_size=8, eval_dataset=None)),
        "score dry": ("score", keys("score_dry", dry_run=True, keep_features=True, **checkpoint)),
        "tokens": ("score", keys("base", score_token_losses=True, train_type="static", component_name=None)),
        "no kind": ("score", keys("no", train_type="static", component_name=None)),
        "random": ("score", keys("no", component_name="random")),
        "none whole": ("score", keys("no", resume_from_checkpoint=True)),
        "stage": ("score", keys("no", deepspeed="ds_zero2.json", **checkpoint)),
    }


@pytest.fixture(scope="module")
def scored(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("score")
    for name in ("small", "data"):
        shutil.copytree(workspace / name, folder / name, ignore=shutil.ignore_patterns(".*"))
    said = run_ranks("tests.driver.score_ranks:in_turn", 2, folder=str(folder), cases=_cases(folder))
    return folder, said[0]


Scored = tuple[Path, dict[str, Any]]


def test_offline_scores_are_those_of_the_decision(scored: Scored) -> None:
    folder, said = scored
    scored_at_2 = scores.read(folder / "at2")
    facts, table = scored_at_2.facts, pd.read_parquet(folder / "at2/scores.parquet")
    decision = json.loads((folder / "run/decisions/step_2.json").read_text())
    assert scored_at_2.score[decision["indices"]].tolist() == pytest.approx(decision["metric"]["score"], abs=0)
    assert (facts.step, facts.domains, facts.features) == (2, ["a", "b"], None)
    assert facts.learning_rate == pytest.approx(np.mean([1e-3 * (1 + np.cos(np.pi * s / 4)) / 2 for s in (0, 1)]))
    assert table["sample_id"].tolist() == list(range(64))
    assert table["dataset"].tolist() == ["a"] * 40 + ["b"] * 24
    assert table["file"].tolist() == ["a.json"] * 40 + ["b.json"] * 24
    assert table["row"].tolist() == [*range(40), *range(24)]
    assert table["score"].tolist() == scored_at_2.score.tolist()
    assert table["rank"][table["score"].idxmax()] == 1 and sorted(table["rank"]) == list(range(1, 65))


def test_what_scoring_took_is_said_and_kept(scored: Scored) -> None:
    folder, said = scored
    cost = json.loads((folder / "at2/scores.json").read_text())["cost"]
    lengths = re.search(r"scores of 64 samples, ([\d,]+) tokens", "\n".join(said["at 2"]))
    assert lengths is not None
    assert (cost["samples_scored"], cost["samples_taken_up"], cost["processes"]) == (64 + 8, 0, 2)
    assert cost["tokens_scored"] > int(lengths[1].replace(",", ""))
    assert 0 < cost["warmup_seconds"] < cost["selection_seconds"] < 600
    assert 72 / cost["samples_scored_per_second"] < cost["selection_seconds"] - cost["warmup_seconds"]
    assert 50 < cost["peak_memory_mib"] < 50_000
    assert said["at 2"][-1].startswith("cost of the selection: ") and "72 samples, " in said["at 2"][-1]
    once = re.search(r"cost of the selection: ([\d.]+) s, ([\d.]+) of them", said["at 4"][-1])
    again = json.loads((folder / "at4/scores.json").read_text())["cost"]  # of two starts; the second one's is little
    assert once is not None and again["selection_seconds"] > float(once[1])
    assert again["warmup_seconds"] == pytest.approx(float(once[2]), abs=0.06)
    assert (again["samples_scored"], again["samples_taken_up"]) == (64 + 8 + 8, 0)
    assert json.loads((folder / "base/scores.json").read_text())["cost"]["warmup_seconds"] == 0


def test_features_are_kept_and_used_again(scored: Scored) -> None:
    folder, said = scored
    at_4 = scores.read(folder / "at4")
    store = StoreReader(Path(at_4.facts.features or ""))
    assert store.read(0, "features").dtype == np.float16 and store.count == 64
    assert any("in 3 shards, 3 of them taken up" in line for line in said["again"])
    assert not [line for line in said["at 4"] if "taken up" in line]
    assert np.unique(at_4.score).size == 64


def test_without_a_checkpoint_the_plain_gradient_is_used_and_said(scored: Scored) -> None:
    folder, said = scored
    assert "less: gradient_type: sgd, since Adam's moments come only with resume_from_checkpoint" in said["base"]
    facts = scores.read(folder / "base").facts
    assert (facts.step, facts.checkpoint, facts.learning_rate) == (0, None, None)
    assert (folder / "base/token_losses/manifest.json").exists()


def test_each_subtask_has_a_column_of_its_own(scored: Scored) -> None:
    folder, _ = scored
    two, each = (scores.read(folder / name) for name in ("two", "each"))
    table = pd.read_parquet(folder / "two/scores.parquet")
    assert (two.facts.subtasks, two.facts.aggregate) == (["target", "b"], "max")
    assert table["score"].tolist() == table[["score: target", "score: b"]].max(axis=1).tolist()
    assert table["score: target"].tolist() == pytest.approx(scores.read(folder / "at2").score.tolist(), abs=1e-6)
    assert (table["score"] == table["score: b"]).sum() not in (0, 64)
    assert (each.facts.subtasks, each.facts.aggregate) == ([f"target[{i}]" for i in range(8)], "mean")
    assert (each.facts.tasks, each.facts.task_of) == (["target"], [0] * 8)
    assert each.each is not None and each.each.mean(axis=1).tolist() == pytest.approx(each.score.tolist(), rel=1e-6)
    assert each.score.tolist() == pytest.approx(table["score: target"].tolist(), abs=1e-5)  # a mean of cosines


def test_with_val_size_the_rows_of_the_target_are_kept_beside_the_scores(scored: Scored) -> None:
    folder, _ = scored
    parts = [pd.read_parquet(folder / "held" / name) for name in ("scores.parquet", "held_out.parquet")]
    assert [part["dataset"].value_counts().to_dict() for part in parts] == [{"a": 35, "b": 21}, {"a": 5, "b": 3}]
    rows = pd.concat(parts).groupby("dataset")["row"]
    assert {name: sorted(own) for name, own in rows} == {"a": list(range(40)), "b": list(range(24))}


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(scored: Scored) -> None:
    folder, said = scored
    for name, parts in (
        ("train dry", ["scoring: .* a pass, 1 passes", "256 B of scores", r"training: 14 steps of \S+ s"]),
        (
            "score dry",
            ["scoring: .* a pass, 1 passes .*samples/s, .* tokens/s", r"512.0 KiB of features .fp16. a pass"],
        ),
    ):
        text = "\n".join(said[name])
        assert re.search("dry run: the pool has 64 samples, 1,[0-9]{3} tokens", text)
        assert re.search(
            r"expected time: \S+ and the start(, evaluations and saves)?; memory of a process: \S+ MiB", text
        )
        for part in parts:
            assert re.search(part, text), (part, text)
    assert not (folder / "dry").exists() and not (folder / "score_dry").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no kind", "score: needs train_type: dynamic_select with a component_name, or score_token_losses: true"),
        ("random", "component_name: selector 'random' has no score for each sample; less and loss have"),
        ("none whole", "resume_from_checkpoint: there is no whole checkpoint in"),
        ("stage", "checkpoint-2: the checkpoint has zero_stage 3, this run has 2"),
    ],
)
def test_what_cannot_be_scored_is_said(scored: Scored, name: str, text: str) -> None:
    assert text in scored[1][name]


def choose(folder: Path, name: str, **keys: Any) -> tuple[list[str], Path]:
    """Run `select`; what it said, and where it wrote."""
    path = folder / f"select_{name}.yaml"
    where = folder / f"chosen_{name}"
    path.write_text(yaml.safe_dump(settings(folder, **{**LESS, **small(folder), "select_dir": str(where), **keys})))
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        select(load_config(path, quiet=True))
    finally:
        logger.removeHandler(handler)
    return lines, where


def _rows(where: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (where / f"{name}.jsonl").read_text().splitlines()]


def test_the_best_rows_are_written_as_they_were(scored: Scored) -> None:
    folder, _ = scored
    lines, where = choose(folder, "best", select_from=[str(folder / "at2")], select_fraction=0.25)
    score = scores.read(folder / "at2").score
    best = np.argsort(-score, kind="stable")[:16]
    raw = {name: json.loads((folder / f"data/{name}.json").read_text()) for name in "ab"}
    found = [row for name in "ab" for row in _rows(where, name)]
    assert sorted(row["dataflex_id"] for row in found) == sorted(best.tolist())
    for row in found:
        place = row.pop("dataflex_id")
        assert row.pop("dataflex_score") == pytest.approx(float(score[place]))
        assert row == (raw["a"] + raw["b"])[place]
    assert lines[-2].startswith("chose 16 of 64 samples (a ")
    assert lines[-1].startswith("cost of the selection: ")
    assert json.loads((where / "dataset_info.json").read_text()).keys() == {"a", "b", "target"}


def test_several_checkpoints_are_summed_by_learning_rate(scored: Scored) -> None:
    folder, _ = scored
    both = [str(folder / "at2"), str(folder / "at4")]
    lines, where = choose(folder, "sum", select_from=both, select_count=10, select_quotas={"a": 3, "b": 1})
    one, two = (scores.read(Path(name)) for name in both)
    total = one.facts.learning_rate * one.score + two.facts.learning_rate * two.score
    assert any(line.startswith("weights, by learning rate: ") for line in lines)
    for name, ids, count in (("a", range(40), 8), ("b", range(40, 64), 2)):
        expected = sorted(ids, key=lambda i: -total[i])[:count]
        assert [row["dataflex_id"] for row in _rows(where, name)] == expected
        assert [row["dataflex_score"] for row in _rows(where, name)] == [pytest.approx(total[i]) for i in expected]


def test_near_duplicates_are_passed_over(scored: Scored) -> None:
    folder, _ = scored
    keys = {"select_from": [str(folder / "at4")], "select_count": 12}
    lines, where = choose(folder, "alike", **keys, select_duplicates=0.5)
    ids = sorted(row["dataflex_id"] for name in "ab" for row in _rows(where, name))
    store = StoreReader(Path(scores.read(folder / "at4").facts.features or ""))
    rows = store.rows("features", np.array(ids)).astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert (unit @ unit.T - np.eye(len(ids))).max() < 0.501
    assert len(ids) == 12 or any("unlike enough" in line for line in lines)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": (
        {"select_from": ["{f}/nowhere"]},
        r"select_from: .*nowhere has no scores.json; make it with: dataflex-cli",
    ),
    "neither": ({"select_count": None}, "select_count: give either select_count or select_fraction"),
    "both": ({"select_fraction": 0.5}, "select_count: give either select_count or select_fraction"),
    "too many": ({"select_count": 65}, "select_count: 65 samples are asked for, 64 are scored"),
    "name": ({"select_quotas": {"bb": 1}}, r"select_quotas: no dataset 'bb' \(did you mean 'b'\?\); scored: a, b"),
    "quota": (
        {"select_count": 60, "select_quotas": "equal"},
        "select_quotas: 30 samples of 'b' are asked for, it has 24",
    ),
    "features": ({"select_duplicates": 0.9}, "at2 was scored without features; score with keep_features: true"),
    "datasets": ({"dataset": ["b", "a"]}, "dataset: b, a, but .*at2 has scores of a, b; select with the datasets"),
    "weights": ({"select_weights": [1, 2]}, r"select_weights: expected one for each folder \(1\), got 2"),
    "rate": (
        {"select_from": ["{f}/at2", "{f}/base"]},
        "select_weights: needed, since the learning rate of .*base is not",
    ),
    "pool": (
        {"select_from": ["{f}/at2", "{f}/other"]},
        "other and .*at2 have scores of different pools; score one pool",
    ),
    "itself": ({"select_dir": "{f}/data"}, "select_dir: .*data is dataset_dir, whose data it would write over"),
    "broken": (
        {"select_from": ["{f}/cut"]},
        "select_from: .*cut: scores.parquet differs from what was written",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_selections_are_one_line(scored: Scored, name: str) -> None:
    folder, _ = scored
    for copy in ("other", "cut"):
        shutil.copytree(folder / "at2", folder / copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("scores"))
    facts = json.loads((folder / "other/scores.json").read_text())
    del facts["seal"]
    write_sealed(folder / "other/scores.json", facts | {"pool": "another"})
    (folder / "cut/scores.parquet").write_bytes(b"PAR1")
    keys, text = WRONG[name]
    filled = json.loads(json.dumps(keys).replace("{f}", str(folder)))
    with pytest.raises(UserError, match=text) as error:
        choose(folder, "wrong", **{"select_from": [str(folder / "at2")], "select_count": 4, **filled})
    assert "\n" not in str(error.value)


def test_changed_data_is_said(scored: Scored, tmp_path: Path) -> None:
    folder, _ = scored
    shutil.copytree(folder / "data", tmp_path / "data")
    rows = json.loads((tmp_path / "data/b.json").read_text())
    (tmp_path / "data/b.json").write_text(json.dumps(rows[1:]))
    with pytest.raises(
        UserError, match="dataset_info.json:b: the data has changed since .*at2 was scored; score again"
    ):
        choose(tmp_path, "x", model_name_or_path="m", select_from=[str(folder / "at2")], select_count=4)


def test_the_rate_of_a_checkpoint_is_that_of_its_own_steps(tmp_path: Path) -> None:
    for step in (2, 4):
        make(tmp_path / f"checkpoint-{step}", step)
    lines = [{"current_steps": step, "lr": rate} for step, rate in enumerate((8.0, 4.0, 2.0, 1.0, 16.0), start=1)]
    (tmp_path / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rates = [scoring._learning_rate(tmp_path / f"checkpoint-{step}") for step in (2, 4)]
    assert rates == [6.0, 1.5]


@pytest.mark.parametrize(
    ("fraction", "there", "chosen"), [(0.5, 7, 4), (0.5, 9, 4), (0.26, 10, 3), (0.01, 10, 1), (1, 3, 3)]
)
def test_a_fraction_of_the_samples_is_rounded_to_the_nearest(fraction: float, there: int, chosen: int) -> None:
    cfg = Config(score=ScoreSection(select_fraction=fraction))
    assert selecting._count(cfg, there) == chosen
