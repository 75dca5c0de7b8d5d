# ruff: noqa: E501 - whole lines of text are easier to search for
"""components.yaml, packaged files by name, and DeepSpeed configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dataflex.config import Config, deepspeed_json, load_config
from dataflex.config.components import component_params, read_components
from dataflex.config.paths import packaged, packaged_folder, resolve, settle
from dataflex.utils.errors import UserError

RUN = {"model_name_or_path": "org/m", "dataset": "a,b", "output_dir": "out"}


def weight_run(**more: Any) -> Config:
    return load_config({**RUN, "train_type": "dynamic_weight", "component_name": "loss", **more}, quiet=True)


def test_component_params_come_from_the_packaged_file_as_a_copy() -> None:
    flex = weight_run().flex
    name, params = component_params(flex, "weight")
    assert name == "loss"
    assert params == {"strategy": "linupper", "delta": 1.0, "r_start": 2.0, "r_end": 0.5}
    params["delta"] = 3.0
    assert component_params(flex, "weight")[1]["delta"] == 1.0


def test_component_params_win_over_the_file_and_leave_its_others() -> None:
    flex = weight_run(component_params={"weight": {"delta": 7.0}}).flex
    assert component_params(flex, "weight")[1] == {"strategy": "linupper", "delta": 7.0, "r_start": 2.0, "r_end": 0.5}


def test_packaged_components_are_complete() -> None:
    groups = read_components(packaged("components.yaml"))
    assert {group: list(entries) for group, entries in groups.items()} == {
        "selectors": [
            *("less", "less_exact", "less_head", "cluster_less", "rds", "near", "tsds", "loss", "random", "custom"),
        ],
        "mixers": ["random", "static", "stratified", "temperature", "odm", "doremi", "dynamic_moe"],
        "weighters": ["loss", "adapt", "adapt_softmax", "dft", "eaft", "rho", "custom"],
    }
    assert groups["selectors"]["less"]["params"] == {
        "gradient_type": "adam",
        "adam_form": "official",
        "scoring": "projected",
        "projection": "xorfold",
        "proj_dim": 4096,
        "seed": 123,
    }


def test_unknown_component_names_the_nearest_the_group_and_what_there_is() -> None:
    with pytest.raises(UserError) as caught:
        weight_run(component_name="los")
    file = packaged("components.yaml")
    text = f"'los' is not in weighters of {file} (did you mean 'loss'?); there are: loss, adapt, adapt_softmax, dft, eaft, rho, custom"
    assert str(caught.value) == f"config:component_name: {text}"
    with pytest.raises(
        UserError, match=r"\('less' is in selectors\); there are: loss, adapt, adapt_softmax, dft, eaft, rho, custom"
    ):
        weight_run(component_name="less")


def test_a_name_of_ones_own_module_is_left_to_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flex = weight_run(component_name="mine", component_modules=["my_pkg.weights"]).flex
    assert component_params(flex, "weight") == ("mine", {})
    monkeypatch.setattr("dataflex.config.components.entry_points", lambda group: ["one"])
    assert component_params(weight_run(component_name="mine").flex, "weight") == ("mine", {})


def test_own_components_file_beside_the_yaml(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("weighters:\n  soft:\n    name: loss\n    params: {delta: 1e-3}\n")
    (tmp_path / "mine.py").write_text("")
    text = "train_type: dynamic_weight\ncomponent_name: soft\ncomponents_cfg_file: mine.yaml\n"
    (tmp_path / "own.yaml").write_text("templates: {}")
    text += "component_modules: mine.py\ntemplate: own.yaml#a\n" + "".join(f"{k}: {v}\n" for k, v in RUN.items())
    (tmp_path / "run.yaml").write_text(text)
    cfg = load_config(tmp_path / "run.yaml", quiet=True)
    assert component_params(cfg.flex, "weight") == ("loss", {"delta": 1e-3})
    assert cfg.flex.component_modules == (str(tmp_path / "mine.py"),)
    assert cfg.data.template == f"{tmp_path}/own.yaml#a"
    assert cfg.dump_flat()["components_cfg_file"] == str(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("selector: {}", "selector: unknown group, expected selectors, mixers, weighters (did you mean 'selectors'?)"),
        ("mixers: [a]", "mixers: expected a mapping of names, got a list"),
        ("mixers: {a: 3}", "mixers.a: expected a mapping with 'params', got a number"),
        ("mixers: {a: {name: a}}", "mixers.a: 'params' is missing, expected a mapping (params: {} for none)"),
        ("mixers: {a: {params: [1]}}", "mixers.a.params: expected a mapping, got a list"),
        ("mixers: {a: {params: {}, name: 3}}", "mixers.a.name: expected text, got a number"),
        ("mixers: {a: {parms: {}, params: {}}}", "mixers.a.parms: unknown key, expected name or params "
         "(did you mean 'params'?)"),
    ],
)  # fmt: skip
def test_wrong_components_file(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        weight_run(components_cfg_file=str(tmp_path / "c.yaml"))
    assert str(caught.value) == f"config:components_cfg_file: {tmp_path}/c.yaml:{line}"


def test_empty_params_and_groups_are_none_given(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("mixers:\nweighters:\n  loss:\n    params:\n")
    flex = weight_run(components_cfg_file=str(tmp_path / "c.yaml")).flex
    assert component_params(flex, "weight") == ("loss", {})


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ds_zero3.json", "ds_zero3.json"),
        ("configs/ds_zero0.json", "ds_zero0.json"),
        ("examples/deepspeed/ds_z3_config.json", "ds_zero3.json"),
        ("ds_z2_config.json", "ds_zero2.json"),
        ("src/dataflex/configs/components.yaml", "components.yaml"),
    ],
)
def test_packaged_files_resolve_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert packaged(name) == resolve(name) == packaged_folder() / file
    assert settle(name, None) == file


def test_own_files_win_over_packaged_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, beside = tmp_path / "here", tmp_path / "beside"
    here.mkdir()
    beside.mkdir()
    monkeypatch.chdir(here)
    (beside / "ds_zero3.json").write_text("{}")
    assert resolve("ds_zero3.json", beside) == beside / "ds_zero3.json"
    assert settle("ds_zero3.json", beside) == str(beside / "ds_zero3.json")
    (here / "ds_zero3.json").write_text("{}")
    assert settle("ds_zero3.json", beside) == "ds_zero3.json"


def test_missing_files_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no packaged file is called 'ds_zer3.json' \(did you mean 'ds_zero3.json'"):
        packaged("ds_zer3.json")
    with pytest.raises(UserError, match="ds_zero3.json' does not exist"):
        resolve(tmp_path / "ds_zero3.json")


@pytest.mark.parametrize("stage", range(4))
def test_packaged_deepspeed_configs_have_auto_values_and_their_stage(stage: int) -> None:
    cfg = load_config({**RUN, "deepspeed": f"ds_zero{stage}.json", "bf16": True}, quiet=True)
    ds = cfg.train.deepspeed_config()
    assert ds["zero_optimization"]["stage"] == stage
    assert ds["train_micro_batch_size_per_gpu"] == ds["bf16"]["enabled"] == "auto"
    ds["zero_optimization"]["stage"] = 9
    assert cfg.train.deepspeed_config()["zero_optimization"]["stage"] == stage


def test_deepspeed_may_be_a_mapping_or_absent() -> None:
    assert load_config(RUN).train.deepspeed_config() == {}
    mapping = {"zero_optimization": {"stage": 1}}
    cfg = load_config({**RUN, "deepspeed": mapping})
    cfg.train.deepspeed_config()["zero_optimization"]["stage"] = 2
    assert cfg.train.deepspeed_config() == mapping
    assert cfg.dump_flat()["deepspeed"] == mapping


TENSOR = "it splits layers over ranks, so per-sample gradients would be incomplete"
ZEROPP = "ZeRO++ quantises or regroups what scoring reads, so features would not be exact"


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, f"'tensor_parallel' is not supported: {TENSOR}"),
        ({"sequence_parallel_size": 2}, "'sequence_parallel_size' is not supported: it splits samples over ranks, so "
         "per-sample gradients would be incomplete"),
        ({"pipeline": {"stages": 2}}, f"'pipeline' is not supported: {TENSOR}"),
        ({"compile": {"deepcompile": True}}, "'compile' is not supported: compiled graphs bypass the layers' hooks "
         "that scoring needs"),
        ({"data_efficiency": {"enabled": True}}, "'data_efficiency' is not supported: DeepSpeed's own data sampler "
         "would replace dataflex's plan"),
        *(({"zero_optimization": {"stage": 3, key: value}}, f"'zero_optimization.{key}' is not supported: {ZEROPP}")
          for key, value in (("zero_quantized_weights", True), ("zero_quantized_gradients", True),
                             ("zero_hpz_partition_size", 8))),
        ({"zero_optimization": {"stage": 4}}, "'zero_optimization.stage' must be 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": 3}, "'zero_optimization' must be a mapping, got a number"),
        ({"gradient_accumulation_steps": 4}, "'gradient_accumulation_steps' is 4, but gradient_accumulation_steps is "
         '1: use "auto"'),
        ({"bf16": {"enabled": True}}, "'bf16.enabled' is true, but bf16 is false: use \"auto\""),
        ({"optimizer": {"params": {"lr": 0.1}}}, "'optimizer.params.lr' is 0.1, but learning_rate is 5e-05: "
         'use "auto"'),
    ],
)  # fmt: skip
def test_refused_deepspeed_config(tmp_path: Path, config: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config({**RUN, "deepspeed": config})
    assert str(caught.value) == f"config:deepspeed: {line}"
    (tmp_path / "ds.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load_config({**RUN, "deepspeed": str(tmp_path / "ds.json")})
    assert str(caught.value) == f"config:deepspeed: {tmp_path}/ds.json: {line}"


# Of a DeepSpeed config: a value that is not the YAML's, whose own is the default.
CONTRADICTIONS: dict[str, tuple[Any, str]] = {
    "train_micro_batch_size_per_gpu": (3, "per_device_train_batch_size"),
    "gradient_accumulation_steps": (3, "gradient_accumulation_steps"),
    "gradient_clipping": (0.5, "max_grad_norm"),
    "bf16.enabled": (True, "bf16"),
    "fp16.enabled": (True, "fp16"),
    "optimizer.params.lr": (0.1, "learning_rate"),
    "optimizer.params.weight_decay": (0.1, "weight_decay"),
}


def test_a_deepspeed_config_contradicts_the_yaml_in_no_key() -> None:
    for dotted, (value, key) in CONTRADICTIONS.items():
        config: Any = value
        for part in reversed(dotted.split(".")):
            config = {part: config}
        with pytest.raises(UserError, match=f"'{dotted}' is .*, but {key} is .*: use \"auto\""):
            load_config({**RUN, "deepspeed": config})
    assert set(CONTRADICTIONS) == set(deepspeed_json.SAME_AS_YAML), "a key needs a row"


@pytest.mark.parametrize("block", ["zero_optimization", "monitor.inner"])
def test_two_is_in_use_and_a_secret_is_found_at_any_depth(block: str) -> None:
    config: Any = {"wandb_api_key": "x"}
    for part in reversed(block.split(".")):
        config = {part: config}
    with pytest.raises(UserError, match=f"'{block}.wandb_api_key' is a password or an access token"):
        load_config({**RUN, "deepspeed": config})
    with pytest.raises(UserError, match="'sequence_parallel_size' is not supported"):
        load_config({**RUN, "deepspeed": {"sequence_parallel_size": 2}})


@pytest.mark.parametrize(
    "config",
    [
        {"tensor_parallel": {"autotp_size": 1}},
        {"compile": {"deepcompile": False, "backend": "inductor"}},
        {"data_efficiency": {"enabled": False, "seed": 1234}},
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": False, "zero_hpz_partition_size": 1}},
        {"gradient_accumulation_steps": 1, "bf16": {"enabled": False}, "gradient_clipping": 1.0},
        {"flops_profiler": {"enabled": True}, "comms_logger": {"enabled": True}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
    ],
)
def test_what_is_switched_off_or_equal_is_not_refused(config: dict[str, Any]) -> None:
    assert load_config({**RUN, "deepspeed": config}).train.deepspeed_config() == config


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{\n "a": 1,\n}', ":3: not valid JSON: "),
        ('{"a": 1, "a": 2}', ": key 'a' is given twice"),
        ("[1]", ": expected a JSON object, got a list"),
    ],
)
def test_unreadable_deepspeed_file(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config({**RUN, "deepspeed": str(tmp_path / "ds.json")})
    assert str(caught.value).startswith(f"config:deepspeed: {tmp_path}/ds.json{line}")
