"""The folder of `dataflex-cli select`: a dataset_dir for the very same config, wherever it is moved."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest

from dataflex.config import Config
from dataflex.config.schema import DataSection, FlexSection, OutputSection
from dataflex.config.sections.score import ScoreSection
from dataflex.data.chosen import Cost, read_chosen, with_chosen_data
from dataflex.data.load import LoadedData, load_data
from dataflex.data.pool import Pool
from dataflex.data.sources.info import read_dataset_infos
from dataflex.data.sources.rows import content_of
from dataflex.driver import chosen_folder, scores
from dataflex.driver.selecting import select
from dataflex.utils.errors import UserError
from dataflex.utils.records import write_sealed
from tests.tiny import byte_tokenizer

RATE = 0.5


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """data/ with a (6 rows), b (two files of 3 and 2 rows in a folder), t and u to evaluate on."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    (data / "b").mkdir(parents=True)
    entries: dict[str, Any] = {
        "a": {"file_name": "a.json"},
        "b": {"file_name": "b", "columns": {"prompt": "q", "response": "r"}},
        "t": {"file_name": "t.jsonl", "num_samples": 1},
        "u": {"file_name": "u.csv"},
        "other": {"file_name": "other.json"},
    }
    (data / "dataset_info.json").write_text(json.dumps(entries))
    (data / "a.json").write_text(json.dumps([{"instruction": f"a{i}", "output": str(i)} for i in range(6)]))
    for file, numbers in (("one", range(3)), ("two", range(3, 5))):
        lines = [json.dumps({"q": f"b{i}", "r": str(i), "kept": [i]}) + "\n" for i in numbers]
        (data / "b" / f"{file}.jsonl").write_text("".join(lines))
    (data / "t.jsonl").write_text('{"instruction": "t", "output": "x"}\n')
    (data / "u.csv").write_text("instruction,output\nu,y\n")
    return tmp_path


def config(root: Path, score: dict[str, Any] | None = None, mixer_eval: tuple[str, ...] = (), **data: Any) -> Config:
    return Config(
        data=DataSection(**{"dataset_dir": str(root / "data"), "dataset": ("a", "b"), "template": "default", **data}),
        output=OutputSection(output_dir=str(root / "chosen")),
        flex=FlexSection(mixer_eval_dataset=mixer_eval),
        score=ScoreSection(**{"select_from": (str(root / "scores"),), **(score or {})}),
    )


def load(cfg: Config) -> LoadedData:
    return load_data(with_chosen_data(cfg), byte_tokenizer())


def texts(pool: Any) -> dict[str, list[str]]:
    """The users' texts by dataset, in the order of the samples."""
    found: dict[str, list[str]] = {name: [] for name in pool.domain_names}
    for i in range(len(pool)):
        text = byte_tokenizer().decode(pool[i]["input_ids"]).removeprefix("Human: ").split("</s>")[0]
        found[pool.domain_names[pool.domain_ids[i]]].append(text)
    return found


def write(root: Path, cfg: Config, values: list[float], name: str = "scores", each: Any = None, **facts: Any) -> None:
    """Scores of the config's pool, as `score` writes them. each: [n, subtasks]."""
    data = load(cfg)
    pool = data.train
    assert isinstance(pool, Pool)
    given: dict[str, Any] = {
        "pool": pool.fingerprint,
        "domains": pool.domain_names,
        "contents": [content_of(info) for info in read_dataset_infos(pool.domain_names, root / "data")],
        "component": "less",
        "checkpoint": None,
        "step": 0,
        "learning_rate": RATE,
        "features": None,
        "cost": Cost(selection_seconds=1.0),
    }
    held_out = data.eval if cfg.data.val_size else None
    table = np.array(values, np.float32)[:, None] if each is None else np.array(each, np.float32)
    scores.write(root / name, scores.Facts(**{**given, **facts}), pool, table, held_out)


def test_a_dataset_without_picks_and_those_to_evaluate_on_are_there_wherever_it_is_moved(root: Path) -> None:
    cfg = config(root, {"select_count": 2}, eval_dataset=("t",), mixer_eval=("u",))
    write(root, cfg, [0, 5, 1, 2, 9, 3, -1, -2, -3, -4, -5])
    select(cfg)
    (root / "elsewhere").mkdir()
    shutil.move(root / "chosen/selected", root / "elsewhere/moved")
    shutil.rmtree(root / "data")
    folder = root / "elsewhere/moved"
    assert json.loads((folder / "dataset_info.json").read_text()) == {
        "a": {"file_name": "a.jsonl"},
        "b": {"file_name": "b.jsonl", "columns": {"prompt": "q", "response": "r"}, "num_samples": 0},
        "t": {"file_name": "eval/t.jsonl", "num_samples": 1},
        "u": {"file_name": "eval/u.csv"},
    }
    assert (folder / "b.jsonl").read_text() == ""
    moved = config(root, dataset_dir=str(folder), eval_dataset=("t", "u"))
    data = load(moved)
    assert texts(data.train) == {"a": ["a4", "a1"]}
    assert texts(data.eval) == {"t": ["t"], "u": ["u"]}


def test_rows_of_a_folder_of_files_are_found_and_the_table_says_who_was_picked(root: Path) -> None:
    cfg = config(root, {"select_count": 3})
    write(root, cfg, [0, 0, 0, 0, 0, 1, 2, 7, 0, 8, 0])
    select(cfg)
    folder = root / "chosen/selected"
    lines = [json.loads(line) for line in (folder / "b.jsonl").read_text().splitlines()]
    assert lines == [
        {"q": "b3", "r": "3", "kept": [3], "dataflex_id": 9, "dataflex_score": 8.0},
        {"q": "b1", "r": "1", "kept": [1], "dataflex_id": 7, "dataflex_score": 7.0},
        {"q": "b0", "r": "0", "kept": [0], "dataflex_id": 6, "dataflex_score": 2.0},
    ]
    table = pd.read_parquet(folder / "scores.parquet")
    assert list(table) == ["sample_id", "dataset", "file", "row", "score", "rank", "picked"]
    assert table["sample_id"].tolist() == list(range(11))
    assert table["dataset"].tolist() == ["a"] * 6 + ["b"] * 5
    assert table["file"].tolist() == ["a.json"] * 6 + ["one.jsonl"] * 3 + ["two.jsonl"] * 2
    assert table["row"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1]
    assert table["score"].tolist() == [0, 0, 0, 0, 0, 1, 2, 7, 0, 8, 0]
    assert table["rank"].tolist() == [5, 5, 5, 5, 5, 4, 3, 2, 5, 1, 5]
    assert np.flatnonzero(table["picked"]).tolist() == [6, 7, 9]
    before = pd.read_parquet(root / "scores/scores.parquet")
    assert before.equals(table.drop(columns="picked"))


def test_with_val_size_the_target_stays_held_out(root: Path) -> None:
    cfg = config(root, {"select_count": 2}, val_size=4.0)
    data = load(cfg)
    held, rest = texts(data.eval), texts(data.train)
    assert [len(held[name]) for name in "ab"] == [2, 2] and [len(rest[name]) for name in "ab"] == [4, 3]
    write(root, cfg, [0, 1, 2, 3, -1, -2, -3])
    select(cfg)
    again = load(config(root, dataset_dir=str(root / "chosen/selected"), val_size=4.0))
    assert texts(again.train) == {"a": [rest["a"][3], rest["a"][2]]}
    assert texts(again.eval) == {"a_held_out": held["a"], "b_held_out": held["b"]}


def test_the_same_command_again_replaces_the_folder(root: Path) -> None:
    cfg = config(root, {"select_count": 1}, eval_dataset=("t",))
    write(root, cfg, [0, 5, 1, 2, 9, 3, -1, -2, -3, -4, -5])
    select(cfg)
    (root / "data/t.jsonl").write_text('{"instruction": "new", "output": "x"}\n')
    more = config(root, {"select_count": 1, "select_quotas": {"b": 1}}, eval_dataset=("t",))
    select(more)
    data = load(config(root, dataset_dir=str(root / "chosen/selected"), eval_dataset=("t",)))
    assert texts(data.train) == {"b": ["b0"]} and texts(data.eval) == {"t": ["new"]}
    assert sorted(path.name for path in (root / "chosen/selected").rglob("*")) == [
        *("a.jsonl", "b.jsonl", "dataflex_selection.json", "dataset_info.json", "eval", "scores.parquet", "t.jsonl"),
    ]


def test_a_folder_that_is_not_whole_is_no_dataset_dir(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(root, {"select_count": 1})
    write(root, cfg, [0.0] * 11)
    select(cfg)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(chosen_folder, "write_table", mock.Mock(side_effect=KeyboardInterrupt))
        select(cfg)
    assert not (root / "chosen/selected/dataset_info.json").exists()
    select(cfg)
    assert texts(load(config(root, dataset_dir=str(root / "chosen/selected"))).train) == {"a": ["a0"]}


def test_a_target_that_is_chosen_from_as_well_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    from dataflex.utils.logging import logger

    cfg = config(root, {"select_count": 1}, eval_dataset=("a",))
    write(root, cfg, [1.0, *[0.0] * 10])
    logger.addHandler(caplog.handler)
    try:
        select(cfg)
    finally:
        logger.removeHandler(caplog.handler)
    assert "eval_dataset: 'a' is chosen from too, so in " in caplog.text
    assert json.loads((root / "chosen/selected/dataset_info.json").read_text()).keys() == {"a", "b"}


def test_the_cost_of_all_scores_is_carried_on_and_a_warm_up_counts_once(root: Path) -> None:
    cfg = config(root, {"select_count": 1, "select_from": (str(root / "s1"), str(root / "s4"))})
    for name, step, seconds in (("s1", 100, 12.0), ("s4", 400, 42.0)):
        cost = Cost(
            selection_seconds=seconds,
            warmup_seconds=seconds - 2,
            samples_scored=20,
            samples_scored_per_second=10.0 if step == 100 else 40.0,
            tokens_scored=90,
            peak_memory_mib=step,
            processes=2,
        )
        write(root, cfg, [0.0] * 11, name, checkpoint=f"runs/warm/checkpoint-{step}", step=step, cost=cost)
    select(cfg)
    chosen = read_chosen(root / "chosen/selected")
    assert chosen is not None and chosen.picked == {"a": 1, "b": 0}
    assert chosen.made_from == [str(root / "s1"), str(root / "s4")]
    assert chosen.cost.selection_seconds == pytest.approx(2 + 2 + 40, abs=2)  # and what choosing took
    assert chosen.cost.selection_seconds > 44
    assert chosen.cost.model_copy(update={"selection_seconds": 44.0}) == Cost(
        selection_seconds=44.0,
        warmup_seconds=40.0,
        samples_scored=40,
        samples_scored_per_second=16.0,  # 40 in 2 + 0.5 s
        tokens_scored=180,
        peak_memory_mib=400,
        processes=2,
    )


def test_a_second_start_of_score_adds_what_it_took_to_the_first_ones(root: Path) -> None:
    """Its shards were made by the first, whose training came before it too; of another checkpoint nothing is known."""
    first = Cost(
        selection_seconds=10.0,
        warmup_seconds=4.0,
        samples_scored=20,
        samples_scored_per_second=10.0,
        tokens_scored=90,
        samples_taken_up=2,
        peak_memory_mib=7.0,
        processes=2,
    )
    write(root, config(root), [0.0] * 11, checkpoint="runs/checkpoint-4", step=4, cost=first)
    own = {"selection_seconds": 5.0, "samples_scored": 8, "tokens_scored": 30, "peak_memory_mib": 9.0, "processes": 1}
    second = first.model_copy(update=own | {"samples_scored_per_second": 4.0, "samples_taken_up": 12})
    facts = scores.read(root / "scores").facts.model_copy(update={"cost": second})
    both = {"selection_seconds": 11.0, "samples_scored": 28, "samples_scored_per_second": 7.0, "tokens_scored": 120}
    found = scores.with_earlier_cost(root / "scores", facts)
    assert found.cost == first.model_copy(update=both | {"peak_memory_mib": 9.0})
    assert found.model_copy(update={"cost": second}) == facts
    for key, value in (("pool", "x"), ("component", "loss"), ("checkpoint", None), ("step", 5)):
        other = facts.model_copy(update={key: value})
        assert scores.with_earlier_cost(root / "scores", other) == other, key
    anew = facts.model_copy(update={"cost": second.model_copy(update={"samples_taken_up": 0})})
    assert scores.with_earlier_cost(root / "scores", anew) == anew
    (root / "scores/scores.json").write_text("{")
    assert scores.with_earlier_cost(root / "scores", facts) == facts


# a0 to a5 and b0 to b4 for three subtasks: the first one's scores are large, the last one's small.
EACH = [[9, 0, 0], [8, 0, 0], [7, 0, 0], [6, 0, 0.1], [5, 0, 0], [4, 0.2, 0], *[[0, 2 - i / 2, 0] for i in range(4)]]
EACH = [*EACH, [0, 0, 0.3]]
SUBTASKS = ["long", "middle", "short"]


@pytest.mark.parametrize(
    ("keys", "picked"),
    [
        ({}, ["a0", "a1", "a2", "a3", "a4"]),
        ({"select_aggregate": "mean"}, ["a0", "a1", "a2", "a3", "a4"]),
        ({"select_aggregate": "round_robin"}, ["a0", "b0", "b4", "a1", "b1"]),
        ({"select_aggregate": "round_robin", "select_quotas": {"a": 3, "b": 2}}, ["a0", "a5", "a3", "b0", "b1"]),
        ({"select_aggregate": "doubly_greedy"}, ["a0", "b0", "b4", "a1", "b1"]),
    ],
)
def test_a_rule_is_chosen_after_scoring(root: Path, keys: dict[str, Any], picked: list[str]) -> None:
    cfg = config(root, {"select_count": 5, **keys})
    write(root, cfg, [max(row) for row in EACH], each=EACH, subtasks=SUBTASKS)
    select(cfg)
    folder = root / "chosen/selected"
    table = pd.read_parquet(folder / "scores.parquet")
    names = [f"{row.dataset}{i if row.dataset == 'a' else i - 6}" for i, row in enumerate(table.itertuples())]
    assert sorted(name for name, taken in zip(names, table["picked"], strict=True) if taken) == sorted(picked)
    written = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    assert [row["instruction"] for row in written] == [name for name in picked if name.startswith("a")]
    assert table[[f"score: {name}" for name in SUBTASKS]].to_numpy().tolist() == np.array(EACH, np.float32).tolist()
    mean = keys.get("select_aggregate") == "mean"
    each = np.array(EACH, np.float32).astype(np.float64)
    assert table["score"].tolist() == pytest.approx((each.mean(1) if mean else each.max(1)).tolist(), rel=1e-12)
    served = {"a0": "long", "b0": "middle", "b4": "short", "a1": "long", "b1": "middle", "a5": "middle", "a3": "short"}
    served["b0"] = "long" if "select_quotas" in keys else "middle"  # in b it is the first one's best, with 0
    rule = keys.get("select_aggregate", "max")
    expected = {name: served[name] if rule in ("round_robin", "doubly_greedy") else "long" for name in picked}
    assert {n: s for n, s in zip(names, table["serves"], strict=True) if isinstance(s, str)} == expected
    chosen = read_chosen(folder)
    assert chosen is not None and chosen.aggregate == keys.get("select_aggregate", "max")


def test_the_component_s_own_rule_is_the_default(root: Path) -> None:
    cfg = config(root, {"select_count": 3})
    write(root, cfg, [max(row) for row in EACH], each=EACH, subtasks=SUBTASKS, aggregate="round_robin")
    select(cfg)
    picked = pd.read_parquet(root / "chosen/selected/scores.parquet").query("picked")["sample_id"]
    assert picked.tolist() == [0, 6, 10]


def test_a_vote_share_of_the_component_holds_offline_too(root: Path) -> None:
    cfg = config(root, {"select_count": 1})
    one = [10.0, 0, 7, 8, 9, 1, 2, 3, 4, -1, 6]
    other = [0.0, 10, 1, 2, 3, 7, 8, 9, -1, 4, 6]  # 10 is the fifth of both
    each = [list(row) for row in zip(one, other, strict=True)]
    for share, picked in ((None, 0), (0.5, 10)):  # the best of a column alone, or the six best of each, votes
        how = {"each": each, "subtasks": ["x", "y"], "aggregate": "vote", "vote_share": share}
        write(root, cfg, [max(row) for row in each], **how)
        select(cfg)
        assert pd.read_parquet(root / "chosen/selected/scores.parquet").query("picked")["sample_id"].tolist() == [
            picked
        ]


def test_picks_for_single_samples_of_the_target_serve_their_subtasks(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    each = np.eye(11, 4).tolist()
    how: dict[str, Any] = {"subtasks": ["x[0]", "y[1]", "x[2]", "x[3]"], "tasks": ["x", "y"], "task_of": [0, 1, 0, 0]}
    cfg = config(root, {"select_count": 4})
    write(root, cfg, [max(row) for row in each], each=each, aggregate="round_robin", **how)
    with caplog.at_level(logging.INFO, "dataflex"):
        select(cfg)
    assert "picks that serve each subtask: x 3, y 1" in caplog.messages
    table = pd.read_parquet(root / "chosen/selected/scores.parquet")
    assert table["serves"][:4].tolist() == ["x", "y", "x", "x"] and table["serves"][4:].isna().all()


def test_probabilities_are_drawn_by(root: Path) -> None:
    shares = [0.5, 0.25, 0.25, *[0.0] * 8]
    how = {"component": "tsds", "aggregate": "draw", "replacement": True}
    cfg = config(root, {"select_count": 11})
    write(root, cfg, shares, **how)
    select(cfg)
    table = pd.read_parquet(root / "chosen/selected/scores.parquet")
    assert table["picked"].sum() == 11 and (table["picked"][:3] > 0).all() and table["picked"][3:].sum() == 0
    assert len((root / "chosen/selected/a.jsonl").read_text().splitlines()) == 11, "a row for each draw"
    write(root, cfg, shares, **{**how, "replacement": False})
    with pytest.raises(UserError, match="^asked for 11 samples, but only 3 can be drawn"):
        select(cfg)
    select(config(root, {"select_count": 3}))
    assert pd.read_parquet(root / "chosen/selected/scores.parquet")["picked"].tolist() == [True] * 3 + [False] * 8
    with pytest.raises(UserError, match="^select_quotas: .* has probabilities .of tsds., by which samples are drawn"):
        select(config(root, {"select_count": 3, "select_quotas": "equal"}))
    select(config(root, {"select_count": 1, "select_aggregate": "max"}))
    assert pd.read_parquet(root / "chosen/selected/scores.parquet")["picked"].tolist() == [True] + [False] * 10


def test_checkpoints_are_summed_for_each_subtask_before_the_rule(root: Path) -> None:
    cfg = config(root, {"select_count": 1, "select_from": (str(root / "s1"), str(root / "s2"))})
    nothing = [[0.0, 0.0]] * 8
    one, two = [[4, 0], [3, 0], [0, 0], *nothing], [[0, 4], [3, 0], [0, 0], *nothing]  # sums of maxima: 8 and 6
    for name, each in (("s1", one), ("s2", two)):
        write(root, cfg, [max(row) for row in each], name, each=each, subtasks=["x", "y"])
    select(cfg)
    table = pd.read_parquet(root / "chosen/selected/scores.parquet")
    assert table["score"].tolist()[:3] == [2.0, 3.0, 0.0]  # half of each
    assert np.flatnonzero(table["picked"]).tolist() == [1]


def test_rules_that_cannot_be_are_one_line(root: Path) -> None:
    cfg = config(root, {"select_count": 1, "select_aggregate": "round_robbin"})
    write(root, cfg, [0.0] * 11, component="loss")
    with pytest.raises(UserError, match=r"^select_aggregate: 'round_robbin' \(did you mean 'round_robin'\?\); valid"):
        select(cfg)
    plain = (
        "^select_aggregate: mean chooses between subtasks, and .*scores has one score for each sample .of loss.; score"
    )
    with pytest.raises(UserError, match=plain):
        select(config(root, {"select_count": 1, "select_aggregate": "mean"}))
    select(config(root, {"select_count": 1, "select_aggregate": "max"}))
    write(root, cfg, [0.0] * 11, "other", subtasks=["x"])
    both = (str(root / "scores"), str(root / "other"))
    with pytest.raises(UserError, match="other has scores of the subtasks x, .*scores of none; score for one target$"):
        select(config(root, {"select_count": 1, "select_from": both}))


WRONG = {
    "cut in half": "select_from: .*scores: scores.parquet differs from what was written; score again",
    "another table": "select_from: .*scores/scores.parquet: no column 'dataset'.*; it has sample_id; score again",
    "not parquet": "select_from: .*scores/scores.parquet: cannot be read: .*; score again",
    "unknown dataset": "select_from: .*scores: 'a' is none of the datasets that were scored; score again",
    "another order": "select_from: .*scores: scores.parquet: its samples are not 0 to 10, in order; score again",
    "old": "select_from: .*scores has scores.npy of an older version, and no scores.parquet; make it with: dataflex",
    "own data": "select_dir: .*selected has a dataset_info.json that is not of a selection; name another folder",
    "held out": "select_from: .*scores: held_out.parquet is missing; score again",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_is_one_line(root: Path, name: str) -> None:
    cfg = config(root, {"select_count": 1}, **({"val_size": 4.0} if name == "held out" else {}))
    write(root, cfg, list(range(7 if name == "held out" else 11)))
    folder = root / "scores"
    table = pd.read_parquet(folder / "scores.parquet")
    facts = json.loads((folder / "scores.json").read_text())
    del facts["seal"]

    def keep(changed: pd.DataFrame | bytes, **more: Any) -> None:
        """Put another table there, and say that it is what was written."""
        if isinstance(changed, bytes):
            (folder / "scores.parquet").write_bytes(changed)
        else:
            changed.to_parquet(folder / "scores.parquet")
        record = scores.FileRecord.of(folder / "scores.parquet").model_dump()
        write_sealed(folder / "scores.json", facts | {"table": record} | more)

    whole = (folder / "scores.parquet").read_bytes()
    if name == "cut in half":
        (folder / "scores.parquet").write_bytes(whole[: len(whole) // 2])
    elif name == "another table":
        keep(table[["sample_id"]])
    elif name == "not parquet":
        keep(whole[: len(whole) // 2])
    elif name == "unknown dataset":
        keep(table, domains=["b"])
        cfg = config(root, {"select_count": 1}, dataset=("b",))
    elif name == "another order":
        keep(table.iloc[::-1])
    elif name == "old":
        (folder / "scores.parquet").rename(folder / "scores.npy")
    elif name == "own data":
        (root / "chosen/selected").mkdir(parents=True)
        (root / "chosen/selected/dataset_info.json").write_text("{}")
    else:
        (folder / "held_out.parquet").unlink()
    with pytest.raises(UserError, match=f"^{WRONG[name]}") as error:
        select(cfg)
    assert not re.search(r"\n", str(error.value))
