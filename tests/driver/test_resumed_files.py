"""Every file of a run that was ended twice and gone on with equals an uninterrupted run's, times apart."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dataflex.core.run_files import RUN_FILES, written
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
    "deepspeed": "ds_zero2.json",
}
ENDED_IN = [5, 7]
STEPS = 11
ENDLESS = {"update_step": None, "update_times": None}
ODM, FULLY = {"train_type": "dynamic_mix", "component_name": "odm"}, {"finetuning_type": "full", "lora_dropout": None}
CASES: dict[str, dict[str, Any]] = {
    "select": {"train_type": "dynamic_select", "component_name": "loss"},
    "mix": {**ODM, "update_step": 1, "update_times": STEPS - 2},
    "weight": {"train_type": "dynamic_weight", "component_name": "adapt", **FULLY, **ENDLESS, "train_step": STEPS},
    "combined": {
        "train_type": ["dynamic_select", "dynamic_mix", "dynamic_weight"],
        "component_name": {"select": "less", "mix": "odm", "weight": "adapt"},
    },
}
# Patterns of RUN_FILES: of every case, of some, and of runs that are compared elsewhere.
PATTERNS = (
    *("config.yaml", "all_results.json", "trainer_log.jsonl", "trainer_state.json", "training_loss.png", "README.md"),
    *("generation_config.json", "tokenizer*", "chat_template*", "checkpoint-*", "zero_to_*.py", "latest"),
)
DECISIONS, WEIGHTS, MIXED = ("decisions/*.json", "decisions/*.parquet"), "weights.jsonl", "*_weights.jsonl"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
FULL = ("config.json", "model*.safetensors*")
ALSO: dict[str, tuple[str, ...]] = {
    "select": (*ADAPTER, *DECISIONS),
    "mix": (*ADAPTER, MIXED),
    "weight": (*FULL, WEIGHTS),
    "combined": (*ADAPTER, *DECISIONS, WEIGHTS, MIXED, "scores"),
}
ELSEWHERE = (
    "*_average_weights.json",  # in engine/test_resumed_state.py
    "eval_results.json",  # in test_merge.py
    *("features", "embeddings", "cache"),  # in test_resumed_scoring.py; of the components' own
    *("special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "additional_chat_templates"),
)
QUICK = "combined"
NAMES = [pytest.param(name, marks=[] if name == QUICK else [pytest.mark.slow]) for name in CASES]
DECIDED = [2, 5, 8]


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(a case's name, the folder with its two runs whole/run and killed/run)."""
    name, folder = request.param, tmp_path_factory.mktemp("resumed")
    cases = {name: settings(workspace, **(SCHEDULE | CASES[name]))}
    ended = run_ranks("tests.driver.ranks:killed_at", 1, folder=str(folder), cases=cases, steps=ENDED_IN)[0]
    assert ended == {name: ENDED_IN}
    return name, folder / name


def test_every_file_is_that_of_the_run_that_was_not_ended(case: tuple[str, Path]) -> None:
    whole, killed = (contents(case[1] / kind / "run") for kind in ("whole", "killed"))
    assert list(killed) == list(whole)
    assert [path for path, content in whole.items() if killed[path] != content] == []
    of_this_case = [file.pattern for file, names in written(case[1] / "whole/run")]
    assert set(PATTERNS) | set(ALSO[case[0]]) == set(of_this_case)


def test_every_kind_of_file_is_compared_or_named() -> None:
    """A new entry of RUN_FILES needs a case here that writes it."""
    compared = {*PATTERNS, *(pattern for patterns in ALSO.values() for pattern in patterns)}
    assert compared | set(ELSEWHERE) == {file.pattern for file in RUN_FILES}


def test_the_files_hold_every_step_once(case: tuple[str, Path]) -> None:
    name, folder = case

    def steps(file: str, key: str = "step") -> list[int]:
        return [json.loads(line)[key] for line in (folder / "killed/run" / file).read_text().splitlines()]

    evaluated = steps("trainer_log.jsonl", "current_steps")
    assert evaluated == [0, 2, 4, 4, 6, 8, 8, 10, 11, 11]
    if name in ("weight", "combined"):
        assert steps("weights.jsonl") == [2, 4, 6, 8, 10, 11]
    if name in ("mix", "combined"):
        assert steps("odm_weights.jsonl") == ([0, *DECIDED, STEPS] if name == "combined" else [0, *range(2, STEPS + 1)])
    if name in ("select", "combined"):
        found = {path.name for path in (folder / "killed/run/decisions").iterdir()}
        assert found == {f"step_{step}.{kind}" for step in DECIDED for kind in ("json", "parquet")}


def test_times_go_on_over_the_starts(case: tuple[str, Path]) -> None:
    folder = case[1] / "killed/run"
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    seconds = [_seconds(line["elapsed_time"]) for line in lines if "loss" in line]
    assert seconds == sorted(seconds)
    results = json.loads((folder / "all_results.json").read_text())
    assert results["train_runtime"] >= seconds[-1]
    assert json.loads((folder / "trainer_state.json").read_text())["log_history"] == lines


def _seconds(shown: str) -> float:
    hours, minutes, seconds = (int(part) for part in shown.split(":"))
    return timedelta(hours=hours, minutes=minutes, seconds=seconds).total_seconds()
