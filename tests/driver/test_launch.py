"""`dataflex-cli train` as a user starts it: two processes, ZeRO-3, LESS with a loss weighter; killed and resumed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

from dataflex.report.trainer_log import read_log
from tests.distributed import PATIENCE_S
from tests.driver.forked_runs import ForkedRun
from tests.driver.run_files import contents
from tests.driver.workspace import ZERO3, small, train, write_yaml

OWN = str(Path(__file__).with_name("own_parts.py"))
KEYS: dict[str, Any] = {
    "deepspeed": ZERO3,
    "eval_dataset": ["target"],
    "train_type": ["dynamic_select", "dynamic_weight"],
    "component_name": {"select": "less", "weight": "mortal"},
    "component_modules": [OWN],
    "warmup_step": 2,
    "update_step": 2,
    "update_times": 3,
    "max_steps": None,
    "save_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "lora_dropout": 0.1,
    "plot_loss": True,
}
SECRETS = {"HF_TOKEN": "hf_" + "q7" * 17, "WANDB_API_KEY": "5ecre7" * 6}
LOG_KEYS = {"current_steps", "total_steps", "loss", "lr", "epoch", "percentage", "elapsed_time", "remaining_time"}


@pytest.fixture(scope="module")
def whole(workspace: Path) -> CompletedProcess[str]:
    """The run without interruption, in whole/."""
    keys = KEYS | small(workspace)
    return train(write_yaml(workspace, "whole.yaml", **keys, output_dir=str(workspace / "whole")), **SECRETS)


@pytest.fixture(scope="module")
def killed(workspace: Path) -> list[CompletedProcess[str]]:
    """The same run in killed/, where the command is given three times.

    Both ranks are killed in step 6, then when the checkpoint of step 6 is whole and nothing else is done.
    """
    config = write_yaml(workspace, "killed.yaml", **KEYS, **small(workspace), output_dir=str(workspace / "killed"))
    return [train(config, DIE_AT="5"), train(config, DIE_AFTER="6"), train(config)]


def _losses(folder: Path) -> list[tuple[int, float, float]]:
    keys = ("current_steps", "loss", "grad_norm")
    return [tuple(e[key] for key in keys) for e in read_log(folder) if "loss" in e]  # type: ignore[misc]


def test_a_good_run_says_what_it_does_and_nothing_else(whole: CompletedProcess[str]) -> None:
    assert whole.returncode == 0, whole.stdout
    lines = whole.stdout.splitlines()
    assert not [line for line in lines if re.search(r"warning|\bwarn\b|\[deepspeed\]|it/s\]|%\|", line, re.I)]
    assert len([line for line in lines if line.startswith("trainable params: ")]) == 1
    assert len([line for line in lines if re.match(r"step 8/8 loss \S+ grad_norm \S+ lr \S+ epoch", line)]) == 1
    assert "  Total train batch size (x 2 processes) = 4" in lines
    assert "  Total optimization steps = 8 (phases of 2, 2, 2, 2 steps)" in lines
    assert any(line.startswith("what less chose, as shares of each decision:") for line in lines)
    said = [line for line in lines if line.strip() and not line.startswith("  ")]
    assert len(said) == len(set(said)), "a line is printed twice"


def test_no_secret_of_the_environment_is_written_or_said(whole: CompletedProcess[str], workspace: Path) -> None:
    files = [path for path in (workspace / "whole").rglob("*") if path.is_file()]
    assert len(files) > 10
    for secret in SECRETS.values():
        assert secret not in whole.stdout
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_the_run_folder_holds_what_it_should(whole: CompletedProcess[str], workspace: Path) -> None:
    folder = workspace / "whole"
    names = {path.name for path in folder.iterdir()}
    expected = {
        "config.yaml",
        "trainer_log.jsonl",
        "trainer_state.json",
        "all_results.json",
        "training_loss.png",
        "README.md",
        "decisions",
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-8",
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "latest",
    }
    assert expected <= names
    history = read_log(folder)
    trained = [entry for entry in history if "loss" in entry]
    assert [entry["current_steps"] for entry in trained] == list(range(1, 9))
    assert all(set(entry) >= LOG_KEYS for entry in trained)
    assert [entry["current_steps"] for entry in history if "eval_loss" in entry] == [0, 4, 8]
    state = json.loads((folder / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"], state["log_history"]) == (8, 8, history)
    assert (folder / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "latest").read_text() == "checkpoint-8"


def test_decisions_name_distinct_samples_and_their_scores(whole: CompletedProcess[str], workspace: Path) -> None:
    paths = sorted((workspace / "whole/decisions").glob("*.json"))
    assert [path.name for path in paths] == ["step_2.json", "step_4.json", "step_6.json"]
    for path in paths:
        record = json.loads(path.read_text())
        assert len(set(record["indices"])) == 2 * 4
        assert record["component"] == "less"
        assert np.isfinite(list(record["metric"].values())[0]).all() or record["metric"]


@pytest.mark.slow
def test_a_killed_run_says_so(killed: list[CompletedProcess[str]]) -> None:
    for start in killed[:2]:
        assert start.returncode not in (0, 2)
        assert "dataflex: error: a worker was killed by SIGKILL" in start.stdout


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_very_same_files(
    whole: CompletedProcess[str], killed: list[CompletedProcess[str]], workspace: Path
) -> None:
    assert killed[2].returncode == 0, killed[2].stdout
    for start, step in ((killed[1], 3), (killed[2], 6)):
        assert "resumed from" in start.stdout and f"after step {step}" in start.stdout
    assert _losses(workspace / "killed") == _losses(workspace / "whole")
    expected, found = contents(workspace / "whole"), contents(workspace / "killed")
    assert list(found) == list(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    lines = [json.loads(line) for line in (workspace / "killed/weights.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9)), "what is written of a step precedes its checkpoint"


PARTS = ("training", "score", "decide", "save", "evaluate")


@pytest.mark.parametrize("name", ["whole", pytest.param("killed", marks=pytest.mark.slow)])
def test_the_results_say_where_the_time_went(request: pytest.FixtureRequest, workspace: Path, name: str) -> None:
    request.getfixturevalue(name)
    results = json.loads((workspace / name / "all_results.json").read_text())
    parts = [results[f"{part}_seconds"] for part in PARTS]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(results["train_runtime"], abs=0.05)
    samples, target = 40 + 24, 8
    passes = {"whole": 3 * samples, "killed": 2 * samples}[name]  # the pass at step 4 was on disk when it was resumed
    checks = {"whole": 1, "killed": 3}[name]  # one a start
    assert results["samples_scored"] == passes + 3 * target + checks
    rate = results["samples_scored"] / results["score_seconds"]
    assert results["samples_scored_per_second"] == pytest.approx(rate, rel=0.02)
    elapsed = [entry["elapsed_time"] for entry in read_log(workspace / name) if "elapsed_time" in entry]
    assert elapsed == sorted(elapsed)


def test_the_config_of_a_run_starts_the_same_run(whole: CompletedProcess[str], workspace: Path) -> None:
    from dataflex.config import load_config

    again = load_config(workspace / "whole/config.yaml", quiet=True)
    first = load_config(workspace / "whole.yaml", quiet=True)
    params = again.flex.component_params
    assert params is not None and params["select"]["gradient_type"] == "adam" and params["weight"] == {}
    assert again.dump_flat() | {"component_params": None} == first.dump_flat() | {"component_params": None}


def test_a_bug_in_own_code_shows_its_traceback_once_and_ends_the_run(workspace: Path) -> None:
    keys = {"component_modules": [OWN], "train_type": "dynamic_select", "component_name": "bug", "update_step": 2}
    keys |= small(workspace) | {"output_dir": str(workspace / "bug")}
    run = ForkedRun(["train", str(write_yaml(workspace, "bug.yaml", **keys))], 2)
    text = run.end(PATIENCE_S)
    assert run.returncode == 1, text
    assert text.count("ZeroDivisionError: division by zero") == 1
    assert "own_parts.py" in text
    assert "destroy_process_group" not in text


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_a_killed_run_resumes_exactly_at_other_stages(workspace: Path, tmp_path: Path, stage: int) -> None:
    shutil.copytree(workspace / "data", tmp_path / "data")
    shutil.copytree(workspace / "model", tmp_path / "model")
    keys = KEYS | {"save_steps": 4, "deepspeed": f"ds_zero{stage}.json", "bf16": True, "finetuning_type": "full"}
    whole = train(write_yaml(tmp_path, "whole.yaml", **keys, output_dir=str(tmp_path / "whole")))
    config = write_yaml(tmp_path, "killed.yaml", **keys, output_dir=str(tmp_path / "killed"))
    train(config, DIE_AT="5")
    again = train(config)
    assert whole.returncode == again.returncode == 0, again.stdout
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
