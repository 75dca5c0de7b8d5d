"""Every file of a run that was ended twice and gone on with equals an uninterrupted run's, times apart."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.driver.run_files import contents
from tests.driver.workspace import settings

# Saved at 3 (inside a logging window of 2 steps), 6 (at its end), 9 and 11; decided at 2, 5 and 8.
SCHEDULE: dict[str, Any] = {
    "warmup_step": 2,
    "update_step": 3,
    "update_times": 3,
    "max_steps": None,
    "save_steps": 3,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "eval_dataset": ["target"],
    "lora_dropout": 0.1,
    "plot_loss": True,
}
ENDED_IN = [5, 7]
STEPS = 11
ODM, LOSS = {"train_type": "dynamic_mix", "component_name": "odm"}, {"update_step": None, "update_times": None}
CASES: dict[str, dict[str, Any]] = {
    "select": {"train_type": "dynamic_select", "component_name": "loss"},
    "mix": {**ODM, "update_step": 1, "update_times": STEPS - 2},
    "weight": {"train_type": "dynamic_weight", "component_name": "adapt", **LOSS, "train_step": STEPS},
    "combined": {
        "train_type": ["dynamic_select", "dynamic_mix", "dynamic_weight"],
        "component_name": {"select": "less", "mix": "odm", "weight": "adapt"},
    },
}


@pytest.fixture(scope="module")
def place(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    cases = {name: settings(workspace, **(SCHEDULE | keys)) for name, keys in CASES.items()}
    ended = run_ranks("tests.driver.ranks:killed_at", 1, folder=str(folder), cases=cases, steps=ENDED_IN)[0]
    assert ended == {name: ENDED_IN for name in CASES}
    return folder


@pytest.mark.parametrize("name", list(CASES))
def test_every_file_is_that_of_the_run_that_was_not_ended(name: str, place: Path) -> None:
    whole, killed = (contents(place / name / kind / "run") for kind in ("whole", "killed"))
    assert list(killed) == list(whole)
    assert [path for path, content in whole.items() if killed[path] != content] == []
    assert {"trainer_log.jsonl", "trainer_state.json", "config.yaml", "checkpoint-11/dataflex_state.pt"} <= set(whole)


def test_the_files_hold_every_step_once(place: Path) -> None:
    def steps(file: str, key: str = "step") -> list[int]:
        return [json.loads(line)[key] for line in (place / file).read_text().splitlines()]

    logged = [2, 4, 6, 8, 10, 11]
    assert steps("weight/killed/run/weights.jsonl") == steps("combined/killed/run/weights.jsonl") == logged
    assert steps("mix/killed/run/odm_weights.jsonl") == [0, *range(2, STEPS + 1)]
    assert steps("combined/killed/run/odm_weights.jsonl") == [0, 2, 5, 8, 11]
    assert sorted(path.name for path in (place / "select/killed/run/decisions").glob("*.json")) == [
        f"step_{step}.json" for step in (2, 5, 8)
    ]
    evaluated = [step for step in steps("select/killed/run/trainer_log.jsonl", "current_steps")]
    assert evaluated == [0, 2, 4, 4, 6, 8, 8, 10, 11, 11]


@pytest.mark.parametrize("name", list(CASES))
def test_times_go_on_over_the_starts(name: str, place: Path) -> None:
    lines = [json.loads(line) for line in (place / name / "killed/run/trainer_log.jsonl").read_text().splitlines()]
    seconds = [_seconds(line["elapsed_time"]) for line in lines if "loss" in line]
    assert seconds == sorted(seconds)
    results = json.loads((place / name / "killed/run/all_results.json").read_text())
    assert results["train_runtime"] >= seconds[-1]
    state = (place / name / "killed/run/trainer_state.json").read_text()
    assert json.loads(state)["log_history"] == lines


def _seconds(shown: str) -> float:
    hours, minutes, seconds = (int(part) for part in shown.split(":"))
    return timedelta(hours=hours, minutes=minutes, seconds=seconds).total_seconds()
