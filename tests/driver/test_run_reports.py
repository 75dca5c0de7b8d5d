"""What a run folder says: the table of a decision, a config that is the run, and a model card with its params."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tests.distributed import run_ranks
from tests.driver.workspace import settings

COMPONENTS = """selectors:
  loss:
    params:
      focus: medium
      seed: 7
"""


@pytest.fixture(scope="module")
def folder(workspace: Path) -> Path:
    return workspace / "reports"


@pytest.fixture(scope="module")
def runs(workspace: Path, folder: Path) -> dict[str, Any]:
    """One run on one rank and on two, with a decision before the first step; then again from its config.yaml."""
    folder.mkdir()
    (folder / "own.yaml").write_text(COMPONENTS)
    keys = {
        "deepspeed": None,
        "save_strategy": "no",
        "train_type": "dynamic_select",
        "component_name": "loss",
        "components_cfg_file": str(folder / "own.yaml"),
        "update_step": 2,
        "update_times": 2,
        "max_steps": None,
        "scoring_batch_tokens": 256,
        "val_size": 8,
        "dataset_dir": "data",
    }
    first = settings(workspace, **keys, output_dir=str(folder / "one"), per_device_train_batch_size=4)
    two = settings(workspace, **keys, output_dir=str(folder / "two"))
    results: dict[str, Any] = run_ranks("tests.driver.ranks:sweep", 1, folder=str(workspace), cases={"one": first})[0]
    (folder / "own.yaml").write_text(COMPONENTS.replace("medium", "low"))
    again = {"like": str(folder / "one/config.yaml"), "output_dir": str(folder / "again")}
    results |= run_ranks("tests.driver.ranks:sweep", 1, folder=str(workspace), cases={"again": again})[0]
    (folder / "own.yaml").write_text(COMPONENTS)
    results |= run_ranks("tests.driver.ranks:sweep", 2, folder=str(workspace), cases={"two": two})[0]
    return results


def test_the_table_holds_the_whole_pool_and_the_picks(runs: dict[str, Any], folder: Path, workspace: Path) -> None:
    frame = pd.read_parquet(folder / "one/decisions/step_2.parquet")
    record = json.loads((folder / "one/decisions/step_2.json").read_text())
    assert len(frame) == 40 + 24 - 8
    assert sorted(record["indices"]) == frame.sample_id[frame.picked].tolist()
    losses = dict(zip(record["indices"], record["metric"]["loss"], strict=True))
    assert frame.score[frame.picked].tolist() == [losses[i] for i in sorted(losses)]
    assert sorted(frame["rank"]) == list(range(1, len(frame) + 1))
    assert frame.sort_values("rank").score.is_monotonic_decreasing
    assert frame.file.tolist() == [f"{name}.json" for name in frame.dataset]
    a = json.loads((workspace / "data/a.json").read_text())
    assert [a[row]["output"] for row in frame.row[frame.dataset == "a"]] == [
        str(37 * row) for row in frame.row[frame.dataset == "a"]
    ]
    assert len(set(zip(frame.dataset, frame.row, strict=True))) == len(frame)


def test_two_ranks_write_the_table_of_one(runs: dict[str, Any], folder: Path) -> None:
    one, two = ((folder / name / "decisions/step_0.parquet").read_bytes() for name in ("one", "two"))
    assert one == two


def test_config_yaml_is_the_run_whatever_became_of_the_components_file(runs: dict[str, Any], folder: Path) -> None:
    config = yaml.safe_load((folder / "one/config.yaml").read_text())
    assert config["dataset_dir"] == str(folder.parent / "data"), "beside the YAML that was run, wherever it is read now"
    assert config["component_params"] == {
        "select": {
            "focus": "medium",
            "focus_weight": 5.0,
            "quantiles": [0.33, 0.66],
            "replacement": False,
            "temperature": 1.0,
            "seed": 7,
        }
    }
    assert runs["again"]["losses"] == runs["one"]["losses"]
    for name in ("step_0", "step_2"):
        one, again = ((folder / run / f"decisions/{name}.parquet").read_bytes() for run in ("one", "again"))
        assert one == again


def test_the_closing_screen_names_every_file_and_no_other(runs: dict[str, Any]) -> None:
    for result in runs.values():
        assert result["listed"] == result["written"]
    assert {
        "decisions/step_0.json",
        "decisions/step_2.parquet",
        "README.md",
        "all_results.json",
        "tokenizer.json",
    } <= set(runs["one"]["listed"])


def test_the_model_card_names_the_params(runs: dict[str, Any], folder: Path) -> None:
    card = (folder / "one/README.md").read_text().splitlines()
    at = card.index("## Component: select by loss")
    assert {"| focus | medium |", "| focus_weight | 5.0 |", "| seed | 7 |"} <= set(card[at : at + 12])


def test_the_config_of_a_run_names_its_paths_from_anywhere(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataflex.config import load_config
    from dataflex.engine.run_config import run_config

    yamls = workspace / "yamls"
    shutil.copytree(workspace / "data", yamls / "data")
    keys = settings(workspace, dataset_dir="data", model_name_or_path="model", sample_weight="data", output_dir="out")
    (yamls / "run.yaml").write_text(yaml.safe_dump(keys))
    monkeypatch.chdir(workspace)
    (workspace / "ds_zero3.json").write_text("{}")
    flat = run_config(load_config(yamls / "run.yaml", quiet=True))
    (workspace / "ds_zero3.json").unlink()
    assert flat["model_name_or_path"] == str(workspace / "model")
    assert flat["dataset_dir"] == str(workspace / "data"), "the working folder's comes before the YAML's"
    assert flat["deepspeed"] == str(workspace / "ds_zero3.json")
    assert (flat["sample_weight"], flat["output_dir"], flat["components_cfg_file"]) == (
        "data",
        "out",
        "components.yaml",
    )
    monkeypatch.chdir(yamls.parent.parent)
    assert run_config(load_config(yamls / "run.yaml", quiet=True))["dataset_dir"] == str(yamls / "data")
