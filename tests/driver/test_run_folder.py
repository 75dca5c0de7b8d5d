"""One output_dir is one run: gone on with, complete, started over, or refused, but never mixed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflex.config import load_config
from dataflex.report.trainer_log import read_log
from dataflex.utils.errors import UserError
from tests.distributed import run_ranks
from tests.driver.workspace import settings

OVER = {"overwrite_output_dir": True}


def _cases(workspace: Path, out: Path) -> dict[str, dict[str, Any]]:
    """In this order, in one folder."""
    run = {"save_steps": 2, "output_dir": str(out), "lora_dropout": 0.1, "deepspeed": None}
    mix = {"train_type": "dynamic_mix", "component_name": "random", "update_step": 1}
    other = {**run, "output_dir": str(out) + "2"}
    chosen = {**run, **mix}
    cases = {
        "first": chosen,
        "again": chosen | {"component_params": {"mix": {"seed": 7}}},  # would be heeded in a run that has steps left
        "unfinished": chosen | {"remove": str(out / "all_results.json")},
        "no more": {**chosen, "resume_from_checkpoint": False},
        "older": {**chosen, "resume_from_checkpoint": str(out / "checkpoint-2")},
        "older anew": {**chosen, **OVER, "resume_from_checkpoint": str(out / "checkpoint-2")},
        "fork": {**chosen, "resume_from_checkpoint": str(out / "checkpoint-2"), "output_dir": str(out) + "3"},
        "broken newest": chosen | {"damage": str(out / "checkpoint-4/dataflex_state.pt")},
        "another seed": {**chosen, "seed": 7},
        "another rate": {**chosen, "learning_rate": 2e-3, "weight_decay": 0.1, "logging_steps": 2},
        "shorter": {**chosen, "max_steps": 3},
        "longer": {**chosen, "resume_from_checkpoint": f"{out}/checkpoint-2", "output_dir": f"{out}6", "max_steps": 5},
        "over": {**run, **OVER, "finetuning_type": "full"},
        "job": {
            **{**run, "finetuning_type": "full", "output_dir": str(out) + "4", "strip": str(out / "checkpoint-4")},
            "resume_from_checkpoint": str(out) + "5/global_step4",
        },
        "no checkpoint": {**other, "save_strategy": "no"},
        "mixed": {**other, "save_strategy": "no"},
        "true": {**other, "resume_from_checkpoint": True, **OVER},
        "named badly": {**other, "resume_from_checkpoint": str(out / "checkpoint-9x")[1:], **OVER},
        "over again": {**other, **OVER},
    }
    return {name: settings(workspace, **keys) for name, keys in cases.items()}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folder") / "out"


@pytest.fixture(scope="module")
def runs(workspace: Path, out: Path) -> dict[str, Any]:
    result: dict[str, Any] = run_ranks(
        "tests.driver.ranks:sweep", 1, folder=str(workspace), cases=_cases(workspace, out)
    )[0]
    return result


def test_a_finished_run_is_complete(runs: dict[str, Any]) -> None:
    assert runs["first"]["trained"] and not runs["again"]["trained"]
    assert runs["again"]["results"] == runs["first"]["results"]
    assert runs["again"]["losses"] == runs["first"]["losses"]
    assert runs["again"]["params"] == runs["first"]["params"], "config.yaml says how the run was made"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no more", "holds an earlier run .trainer_log.jsonl. that is not to be gone on with; .*overwrite_output_dir"),
        ("older", "checkpoint-4 would be written again; name another output_dir"),
        ("another seed", "^seed: was 42, now 7: a resume goes on as .*checkpoint-4 was made; put it back, or start in"),
        ("another rate", "^learning_rate: was 0.001, now 0.002; weight_decay: was 0.0, now 0.1: a resume goes on as"),
        ("shorter", "^max_steps: the run would end after 3 steps, .*checkpoint-4 has done 4"),
        (
            "mixed",
            "holds an earlier run .trainer_log.jsonl. that has no whole checkpoint to go on from and has results "
            ".all_results.json.; name another",
        ),
        ("true", "resume_from_checkpoint: there is no whole checkpoint in"),
        ("named badly", "resume_from_checkpoint: .*checkpoint-9x: it does not exist"),
    ],
)
def test_what_would_mix_two_runs_is_refused(runs: dict[str, Any], name: str, text: str) -> None:
    assert re.search(text, runs[name].get("error", "no error")), runs[name]


def test_a_run_that_was_ended_after_its_last_step_is_finished(runs: dict[str, Any]) -> None:
    assert runs["unfinished"]["trained"] and runs["unfinished"]["losses"] == runs["first"]["losses"]
    assert runs["unfinished"]["results"]["train_loss"] == runs["first"]["results"]["train_loss"]


@pytest.mark.parametrize("name", ["older anew", "fork", "broken newest"])
def test_a_resumed_run_ends_as_the_whole_one_did(runs: dict[str, Any], name: str) -> None:
    assert runs[name]["trained"]
    assert runs[name]["losses"] == runs["first"]["losses"]


def test_what_a_refused_resume_says_of_itself_is_not_written(runs: dict[str, Any], out: Path) -> None:
    config = yaml.safe_load((out / "checkpoint-4/config.yaml").read_text())
    assert (config["learning_rate"], config["seed"], config["max_steps"]) == (1e-3, 42, 4)


def test_a_length_is_heeded_on_resume(runs: dict[str, Any], out: Path) -> None:
    assert len(runs["longer"]["losses"]) == 5 and runs["longer"]["losses"][:2] == runs["first"]["losses"][:2]
    assert yaml.safe_load(Path(f"{out}6/config.yaml").read_text())["max_steps"] == 5


def test_a_fork_has_what_was_decided_before_its_checkpoint(runs: dict[str, Any], workspace: Path, out: Path) -> None:
    folder = Path(str(out) + "3")
    steps = [json.loads(line)["step"] for line in (folder / "random_weights.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4], "the decisions of both and what the domains gave by the end"
    assert sorted(p.name for p in folder.glob("decisions/*")) == [f"step_{step}.json" for step in range(4)]
    assert [line["current_steps"] for line in read_log(folder)] == [1, 2, 3, 4]


def test_starting_over_leaves_nothing_of_the_earlier_run(runs: dict[str, Any]) -> None:
    files = set(runs["over"]["files"])
    assert {"model.safetensors", "config.json", "checkpoint-2", "checkpoint-4"} <= files
    assert not files & {"adapter_model.safetensors", "adapter_config.json", "decisions", "random_weights.jsonl"}
    assert runs["over again"]["losses"] == runs["no checkpoint"]["losses"]


def test_a_run_starts_from_what_deepspeed_alone_has_saved(runs: dict[str, Any]) -> None:
    """All its own steps, from weights that four steps of another run had trained."""
    assert runs["job"]["trained"] and len(runs["job"]["losses"]) == len(runs["over"]["losses"])
    assert runs["job"]["losses"][0] < runs["over"]["losses"][0]


def test_a_folder_without_a_run_is_never_cleared(workspace: Path, tmp_path: Path) -> None:
    from dataflex.engine.folder import run_folder

    (tmp_path / "decisions.txt").write_text("mine")
    (tmp_path / "config.json").write_text("mine")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(workspace, output_dir=str(tmp_path), **OVER)))
    cfg = load_config(path, quiet=True)
    run_folder.begin(cfg, run_folder.prepare(cfg))
    assert (tmp_path / "decisions.txt").read_text() == (tmp_path / "config.json.before").read_text() == "mine"
    assert "output_dir" in (tmp_path / "config.yaml").read_text()


def test_changes_are_told_from_the_config_beside_a_checkpoint(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the checkpoint is of a version without a copy in it, or without a key."""
    from dataflex.engine.folder.resumed import check_resume

    start = tmp_path / "checkpoint-2"
    start.mkdir()
    before = load_config(settings(workspace), quiet=True).dump_flat()
    del before["weight_decay"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
    free = {"save_steps": 9, "output_dir": "elsewhere", "gradient_checkpointing": False, "plot_loss": True}
    check_resume(load_config(settings(workspace, **free), quiet=True), start)
    assert capsys.readouterr().err == ""
    check_resume(load_config(settings(workspace, max_steps=8), quiet=True), start)
    assert "max_steps: was 4, now 8, heeded from this resume on" in capsys.readouterr().err
    told = {"eval_dataset": "target", "subtask_column": "size"}
    check_resume(load_config(settings(workspace, **told), quiet=True), start)
    assert "subtask_column: was None, now size, heeded from this resume on" in capsys.readouterr().err
    with pytest.raises(UserError, match="^lora_rank: was 8, now 4; warmup_ratio: was 0.0, now 0.1: a resume"):
        check_resume(load_config(settings(workspace, lora_rank=4, warmup_ratio=0.1), quiet=True), start)


def test_a_resume_says_changed_params_and_takes_the_policy_that_a_stopped_run_advises(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataflex.engine.folder import start_over
    from dataflex.engine.folder.resumed import check_resume
    from dataflex.engine.run_config import run_config

    start = tmp_path / "checkpoint-2"
    start.mkdir()
    keys = {"train_type": "dynamic_mix", "component_name": "odm", "update_step": 1}
    cfg = load_config(settings(workspace, **keys, component_params={"mix": {"alpha": 0.9, "variant": "paper"}}))
    before = run_config(cfg)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
    own = {"mix": {"alpha": 0.5, "variant": "paper"}}
    changed = load_config(settings(workspace, **keys, component_params=own, nonfinite="skip", nonfinite_limit=3))
    capsys.readouterr()
    check_resume(changed, start)
    said = capsys.readouterr().err
    for change in ("component_params.mix.alpha: was 0.9, now 0.5", "nonfinite: was stop, now skip"):
        assert f"{change}, heeded from this resume on" in said
    assert "variant" not in said
    skipping = load_config(settings(workspace, **keys, component_params=before["component_params"], nonfinite="skip"))
    assert start_over.obstacle(skipping, tmp_path) is None


def test_another_global_batch_is_refused_before_data_and_model_are_read(
    runs: dict[str, Any], out: Path, workspace: Path
) -> None:
    from dataflex.engine.folder import run_folder

    before = sorted(out.iterdir())
    with pytest.raises(UserError) as error:
        run_folder.prepare(
            load_config(settings(workspace, output_dir=str(out), per_device_train_batch_size=3), quiet=True)
        )
    assert str(error.value) == (
        f"{out}/checkpoint-4: the checkpoint has a global batch of 2 x 1 x 1 = 2 samples "
        "(per_device_train_batch_size x gradient_accumulation_steps x processes), this run has 3 x 1 x 1 = 3; with "
        "--num_processes 1 set "
        "per_device_train_batch_size: 2 and gradient_accumulation_steps: 1, or go on with --num_processes 1, "
        "per_device_train_batch_size: 2 and gradient_accumulation_steps: 1"
    )
    assert sorted(out.iterdir()) == before


ELASTIC = {"train_type": "dynamic_mix", "component_name": "odm", "update_step": 1, "warmup_step": 1, "update_times": -1}


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"finetuning_type": "full"}, {"deepspeed": None}], ids=["lora", "full", "zero 0"])
def test_a_run_of_one_process_goes_on_on_two(keys: dict[str, Any], workspace: Path, tmp_path: Path) -> None:
    """The mixer learns from the losses; what it has learned by step 2 decides what the rest is."""
    run = ELASTIC | {"save_steps": 2, "max_steps": 6, "gradient_accumulation_steps": 2} | keys
    whole = settings(workspace, **run, output_dir=str(tmp_path / "whole"))
    rest = settings(workspace, **run, output_dir=str(tmp_path / "rest")) | {
        "resume_from_checkpoint": str(tmp_path / "whole/checkpoint-2"),
        "per_device_train_batch_size": 1,
    }
    one, two = (
        run_ranks("tests.driver.ranks:sweep", world, folder=str(tmp_path), cases={"run": case})[0]["run"]
        for world, case in ((1, whole), (2, rest))
    )
    assert len(one["losses"]) == 6 and len(set(one["losses"])) == 6
    assert two["losses"][-4:] == pytest.approx(one["losses"][2:], abs=1e-5)
    first, second = (
        [json.loads(line) for line in (tmp_path / name / "odm_weights.jsonl").read_text().splitlines()]
        for name in ("whole", "rest")
    )
    assert [line["step"] for line in first] == [line["step"] for line in second]
    shares = [list(line["weights"].values()) for line in first]
    assert shares[-1] != shares[0]
    for line, weights in zip(second, shares, strict=True):
        assert list(line["weights"].values()) == pytest.approx(weights, abs=1e-5)


@pytest.mark.parametrize(
    "content", [b"", b"a: [", b"\xff\xfe\xff", b"- a", b"!!python/object:os.system {}", b"[" * 3000]
)
def test_a_damaged_config_of_a_checkpoint_is_one_line(workspace: Path, tmp_path: Path, content: bytes) -> None:
    from dataflex.engine.folder.resumed import check_resume

    start = tmp_path / "checkpoint-2"
    start.mkdir()
    (start / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=rf"^{start}/config.yaml: .*; what the run was made with is not known"):
        check_resume(load_config(settings(workspace), quiet=True), start)
