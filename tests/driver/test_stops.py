"""Runs that are asked to end: what is saved, what they say, and that the same command ends as if nothing had been."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.distributed import run_ranks
from tests.driver.workspace import ZERO3, settings, small

LESS: dict[str, Any] = {
    "deepspeed": ZERO3,
    "eval_dataset": ["target"],
    "train_type": "dynamic_select",
    "component_name": "less",
    "warmup_step": 1,
    "update_step": 2,
    "update_times": 1,
    "max_steps": None,
    "score_shard_samples": 16,
    "scoring_batch_tokens": 512,
    "save_strategy": "no",
}
AUTO = {"resume_from_checkpoint": "auto"}


def _cases(workspace: Path, root: Path) -> dict[str, dict[str, Any]]:
    """In this order; a name's first word is its folder, and the rest says which start it is."""
    plain = {"save_steps": 10, "max_steps": 5, "lora_dropout": 0.1, "deepspeed": "ds_zero2.json"}
    over = {"overwrite_output_dir": True}
    cases = {
        "whole": plain,
        "term": plain | {"at": 3, "rank": 1},
        "term again": plain,
        "late": plain | {"save_steps": 2, "at": 4, "long_saves": True},
        "late again": plain | AUTO,
        "usr1": plain | over | AUTO | {"at": 2, "number": signal.SIGUSR1, "long_saves": True},
        "usr1 again": plain | over | AUTO,
        "over": plain | over | {"at": 2, "number": signal.SIGINT},
        "last": plain | {"at": 5},
        "hours": plain | {"max_hours": 1e-6},
        "unsaved": plain | {"save_strategy": "no", "at": 2},
        "unsaved otherwise": plain | {"learning_rate": 0.5} | AUTO,
        "unsaved again": plain | {"logging_steps": 1} | AUTO,
        "model": plain | {"save_only_model": True, "save_steps": 1, "at": 3},
        "model again": plain | {"save_only_model": True, "save_steps": 1},
        "chosen": LESS,
        "pass": LESS | {"after_shards": 2},
        "pass again": LESS,
        "score": LESS | {"command": "score", "after_shards": 1},
        "score again": LESS | {"command": "score"},
        "tokens": LESS | {"command": "score", "score_token_losses": True, "after_shards": 1},
        "tokens again": LESS | {"command": "score", "score_token_losses": True},
    }
    place = lambda name: {"output_dir": str(root / name.split()[0])}  # noqa: E731
    return {name: settings(workspace, **small(workspace), **place(name), **keys) for name, keys in cases.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stops")


@pytest.fixture(scope="module")
def runs(workspace: Path, root: Path) -> dict[str, Any]:
    """What rank 0 saw; rank 1 stopped where rank 0 did."""
    one, other = run_ranks("tests.driver.stop_ranks:sweep", 2, cases=_cases(workspace, root))
    for name, run in one.items():
        assert bool(run["stopped"]) == bool(other[name]["stopped"]), name
    return one


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("term", r"stopped after step 3 of 5 \(asked of another process\): saved {out}/checkpoint-3; {same} there"),
        (
            "late",
            r"stopped after step 4 of 5 \(SIGTERM\): nothing is saved after {out}/checkpoint-2, since the last save "
            r"took 1000000 s and stop_grace_seconds is 30; {same} there",
        ),
        ("usr1", r"stopped after step 2 of 5 \(SIGUSR1\): saved {out}/checkpoint-2; {same} there"),
        (
            "over",
            r"stopped after step 2 of 5 \(SIGINT\): saved {out}/checkpoint-2; to go on from there, give "
            "resume_from_checkpoint=auto",
        ),
        ("hours", r"stopped after step 1 of 5 \(max_hours: 1e-06\): saved {out}/checkpoint-1; {same} there"),
        (
            "unsaved",
            r"stopped after step 2 of 5 \(SIGTERM\): nothing is saved to go on from \(save_strategy: no\); the same "
            "command starts over",
        ),
        (
            "model",
            r"stopped after step 3 of 5 \(SIGTERM\): nothing is saved to go on from \(save_only_model: true\); start "
            "over with overwrite_output_dir=true",
        ),
        (
            "pass",
            r"stopped inside a scoring pass \(SIGTERM\): 2 of 4 shards are kept in {out}/scores/\w{{16}}; the same "
            "command goes on with the next one",
        ),
        ("score", r"stopped inside a scoring pass \(SIGTERM\): 1 of 4 shards are kept in {out}/scores/\w{{16}}; .*"),
        ("tokens", r"stopped inside a scoring pass \(SIGTERM\): 1 of 4 shards are kept in {out}/token_losses; .*"),
    ],
)
def test_the_last_line_says_what_is_saved_and_how_it_goes_on(
    runs: dict[str, Any], root: Path, name: str, line: str
) -> None:
    expected = line.format(out=re.escape(str(root / name)), same="the same command goes on from")
    assert re.fullmatch(expected, runs[name]["stopped"]), runs[name]


@pytest.mark.parametrize("name", ["term again", "late again", "usr1 again", "last", "unsaved again"])
def test_the_same_command_ends_as_the_run_that_was_not_stopped(runs: dict[str, Any], name: str) -> None:
    whole = runs["whole"]
    assert [step for step, _ in whole["losses"]] == [1, 2, 3, 4, 5] and len(whole["weights"]) > 1000
    assert runs[name]["losses"] == whole["losses"] and runs[name]["weights"] == whole["weights"]
    assert "all_results.json" in runs[name]["files"] and ".dataflex.lock" not in runs[name]["files"]


def test_what_was_stopped_has_a_whole_checkpoint_and_no_export(runs: dict[str, Any]) -> None:
    assert "checkpoint-3" in runs["term"]["files"] and not runs["term"]["weights"]
    assert [name for name in runs["late"]["files"] if name.startswith("checkpoint")] == ["checkpoint-2"]


def test_starting_over_keeps_the_earlier_logs_and_needs_the_same_configuration(
    runs: dict[str, Any], root: Path
) -> None:
    assert "has another learning_rate (0.001, here 0.5); name another folder" in runs["unsaved otherwise"]["error"]
    assert "trainer_log.1.jsonl" in runs["unsaved again"]["files"]
    earlier = (root / "unsaved/trainer_log.1.jsonl").read_text().splitlines()
    assert [re.findall(r'"current_steps": (\d+)', line) for line in earlier] == [["1"], ["2"]]
    assert "checkpoint-5" in runs["unsaved again"]["files"]
    assert "model again" in runs and "has exported weights (checkpoint-" in runs["model again"]["error"]


def test_a_stopped_pass_goes_on_to_the_same_choice(runs: dict[str, Any], root: Path) -> None:
    assert runs["pass"]["scores"] == 2 and runs["pass again"]["scores"] == 4
    assert len(runs["chosen"]["decisions"]["step_1.json"]) == 8
    assert runs["pass again"]["decisions"] == runs["chosen"]["decisions"]
    assert runs["pass again"]["weights"] == runs["chosen"]["weights"]
    assert "scores.parquet" in runs["score again"]["files"]
    cost = json.loads((root / "score/scores.json").read_text())["cost"]
    pool = pd.read_parquet(root / "score/scores.parquet")
    assert 0 < cost["samples_taken_up"] == -(-len(pool) // 4)
    assert cost["samples_scored"] < len(pool)
    assert len(list((root / "tokens/token_losses").glob("values-*.npy"))) == 4
