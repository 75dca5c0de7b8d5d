"""Runs of every kind, under ZeRO 0 to 3 and two ranks: they train, and what they export is what they trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.report.trainer_log import read_log
from tests.distributed import ROOT, run_ranks
from tests.driver.workspace import settings

FULL: dict[str, Any] = {"finetuning_type": "full"}
FEW: dict[str, Any] = {"lora_target": ["q_proj", "down_proj"]}
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora z0": {"deepspeed": None},
    "lora bf16": {**FEW, "bf16": True, "additional_target": ["embed_tokens", "lm_head"]},
    "lora new tokens": {**FEW, "new_special_tokens": ["<x>", "<y>"], "model_name_or_path": "tied"},
    "lora packed": {**FEW, "packing": True, "use_reentrant_gc": False},
    "full z3 tied": {**FULL, "model_name_or_path": "tied"},
    "full z3 bf16": {**FULL, "bf16": True},
    "full z0 bf16": {**FULL, "bf16": True, "deepspeed": "ds_zero0.json"},
    "full z2": {**FULL, "deepspeed": "ds_zero2.json", "gradient_checkpointing": False},
    "full z3": FULL,
    "freeze new tokens": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "new_special_tokens": ["<x>"]},
    "pt scratch": {**FULL, "stage": "pt", "dataset": ["text"], "train_from_scratch": True},
    "grouped": {**FULL, "group_by_length": True, "deepspeed": "ds_zero1.json"},
    "sgd held out": {"optim": "sgd", "val_size": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"},
    "less z2": {
        **FULL,
        "deepspeed": "ds_zero2.json",
        "train_type": "dynamic_select",
        "component_name": "less",
        "eval_dataset": ["target"],
        "warmup_step": 2,
        "update_step": 2,
    },
    "less z3": {
        **FULL,
        "train_type": "dynamic_select",
        "component_name": "less",
        "eval_dataset": ["target"],
        "warmup_step": 2,
        "update_step": 2,
    },
    "weights": {
        **FULL,
        "sample_weight": "1 + (size > 4)",
        "sample_weight_as": "both",
        "domain_weights": {"a": 2},
        "class_weights": {"7": 0.5},
        "token_weight_spans": {"3": ["7", 2.0]},
        "layer_lr_multipliers": {"layers.0": 0.1},
        "sampling": "temperature",
        "train_type": "dynamic_weight",
        "component_name": "adapt",
        "eval_dataset": ["target"],
        "plot_loss": True,
    },
    "own optimizer": {
        **FULL,
        "deepspeed": {
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {
                    "warmup_min_lr": "auto",
                    "warmup_max_lr": "auto",
                    "warmup_num_steps": "auto",
                    "total_num_steps": "auto",
                },
            },
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        },
    },
    "model only, newest two": {"save_only_model": True, "save_steps": 1, "save_total_limit": 2, **FULL},
}
MORE: dict[str, dict[str, Any]] = {
    **{
        f"{kind} z{stage} {precision}": {
            "finetuning_type": kind,
            "deepspeed": f"ds_zero{stage}.json",
            "bf16": precision == "bf16",
        }
        for kind in ("lora", "full", "freeze")
        for stage in range(4)
        for precision in ("fp32", "bf16")
    },
    "neat": {"neat_packing": True},
    "accumulate": {"gradient_accumulation_steps": 2, "disable_gradient_checkpointing": True},
    "pt lora unpacked": {"stage": "pt", "packing": False, "dataset": ["text"]},
    "epochs": {
        "max_steps": None,
        "num_train_epochs": 1,
        "eval_dataset": ["target"],
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
    },
    "offload": {"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}},
    "fused": {"optim": "adamw_torch_fused", "weight_decay": 0.1, "lora_dropout": 0.1},
}
PACKAGED = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != "components")


def _runs(workspace: Path, cases: dict[str, dict[str, Any]], ranks: int = 2) -> dict[str, Any]:
    made = {}
    for name, keys in cases.items():
        model = workspace / keys.get("model_name_or_path", "model")
        made[name] = settings(workspace, **{**keys, "model_name_or_path": str(model), "output_dir": None})
    results: dict[str, Any] = run_ranks("tests.driver.ranks:sweep", ranks, folder=str(workspace), cases=made)[0]
    return results


@pytest.fixture(scope="module")
def runs(workspace: Path) -> dict[str, Any]:
    return _runs(workspace, CASES)


def _trained(result: dict[str, Any], steps: int = 4) -> None:
    assert "error" not in result, result
    assert len(result["losses"]) == steps
    assert result["gap"] < 1e-6
    assert result["listed"] == result["written"], "the closing screen names every file, and no other"
    assert {"config.yaml", "trainer_state.json", "README.md", "tokenizer.json"} <= set(result["files"])


@pytest.mark.parametrize("name", CASES)
def test_a_run_trains_and_exports_what_it_trained(runs: dict[str, Any], name: str) -> None:
    _trained(runs[name])


def test_a_run_does_not_depend_on_the_stage_or_the_precision(runs: dict[str, Any]) -> None:
    assert runs["lora z0"]["losses"] == pytest.approx(runs["lora"]["losses"], rel=1e-6)
    assert runs["full z2"]["losses"] == pytest.approx(runs["full z3"]["losses"], rel=1e-6)
    for name in ("full z3 bf16", "full z0 bf16"):
        assert runs[name]["losses"] == pytest.approx(runs["full z3"]["losses"], rel=1e-3)


def test_less_chooses_the_same_at_every_stage(runs: dict[str, Any], workspace: Path) -> None:
    paths = [workspace / "runs" / name / "decisions/step_2.json" for name in ("less_z2", "less_z3")]
    two, three = (json.loads(path.read_text()) for path in paths)
    assert two["indices"] == three["indices"]


def test_an_optimizer_in_the_deepspeed_config_gets_the_values_of_the_yaml(runs: dict[str, Any]) -> None:
    losses, without = runs["own optimizer"]["losses"], runs["full z3"]["losses"]
    assert losses[0] == pytest.approx(without[0], rel=1e-6)
    assert losses[-1] < losses[0]


def test_a_weighted_run_tells_of_its_weights(runs: dict[str, Any], workspace: Path) -> None:
    lines = [json.loads(line) for line in (workspace / "runs" / "weights" / "weights.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(0 < line["min"] < line["max"] and set(line["domains"]) <= {"a", "b"} for line in lines)
    logged = [entry["weight_mean"] for entry in read_log(workspace / "runs" / "weights") if "loss" in entry]
    assert logged == [line["mean"] for line in lines]


def test_grouping_changes_the_order_only(runs: dict[str, Any]) -> None:
    assert runs["grouped"]["losses"][0] != pytest.approx(runs["full z3"]["losses"][0], rel=1e-3)


def test_evaluations_fall_before_between_and_after_the_steps(runs: dict[str, Any]) -> None:
    result = runs["sgd held out"]
    assert [step for step, _ in result["evals"]] == [0, 2, 4]
    assert result["results"]["eval_loss"] == result["evals"][-1][1]
    assert not [name for name in result["files"] if name.startswith("checkpoint")]


def test_old_checkpoints_go_and_those_of_the_model_load(runs: dict[str, Any], workspace: Path) -> None:
    from transformers import AutoModelForCausalLM

    files = runs["model only, newest two"]["files"]
    assert [name for name in files if name.startswith("checkpoint")] == ["checkpoint-3", "checkpoint-4"]
    folder = workspace / "runs" / "model_only,_newest_two"
    AutoModelForCausalLM.from_pretrained(folder / "checkpoint-4")


@pytest.mark.parametrize(
    ("name", "dtype", "tied"), [("full_z3_tied", "float32", True), ("full_z3_bf16", "bfloat16", False)]
)
def test_the_exported_config_is_that_of_a_model_to_use(
    runs: dict[str, Any], workspace: Path, name: str, dtype: str, tied: bool
) -> None:
    config = json.loads((workspace / "runs" / name / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["use_cache"] is True
    assert (config["dtype"], config["tie_word_embeddings"]) == (dtype, tied)


def _packaged(workspace: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    import yaml

    return {name: change(yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())) for name in PACKAGED}


@pytest.mark.slow
def test_every_packaged_yaml_runs(workspace: Path) -> None:
    def small(keys: dict[str, Any]) -> dict[str, Any]:
        tiny = {"model_name_or_path": "model", "dataset": ["a", "b"], "bf16": False, "save_strategy": "no"}
        fast = {"update_step": 2, "update_times": 1 if "warmup_step" in keys else 2} if "update_step" in keys else {}
        waits = {"warmup_step": 2} if "warmup_step" in keys else {}
        ends = {"train_step": None, "max_steps": None if fast else 4}
        target = {"eval_dataset": ["target"]} if "eval_dataset" in keys else {}
        if keys.get("component_name") == "doremi":
            tiny["reference_model_path"] = str(workspace / "tied")
        if keys.get("component_name") == "dynamic_moe":
            tiny["model_name_or_path"] = "moe"
        target |= {"domain_weights": {"a": 2}} if "domain_weights" in keys else {}
        return keys | tiny | fast | waits | ends | target | {"logging_steps": 1, "gradient_accumulation_steps": 1}

    results = _runs(workspace, _packaged(workspace, small))
    for name in PACKAGED:
        _trained(results[name])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_whole_matrix(workspace: Path, tmp_path: Path, ranks: int) -> None:
    import shutil

    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs"))
    results = _runs(tmp_path, MORE, ranks)
    steps = {"epochs": -(-64 // (2 * ranks))}
    for name in MORE:
        _trained(results[name], steps.get(name, 4))
