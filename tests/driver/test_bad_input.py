"""What can only be seen at run time is said in one line, the same on every rank, and nothing hangs."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.driver.workspace import settings, small

OWN = str(Path(__file__).with_name("own_parts.py"))


def _select(name: str, **keys: Any) -> dict[str, Any]:
    return {
        "train_type": "dynamic_select",
        "component_name": name,
        "update_step": 2,
        "component_modules": [OWN],
        **keys,
    }


def _mix(name: str) -> dict[str, Any]:
    return _select(name) | {"train_type": "dynamic_mix"}


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "dataset": ({"dataset": ["aa"]}, "dataset: 'aa' is not in .*did you mean 'a'"),
    "masked": ({"dataset": ["masked"]}, "masked: none of its 2 rows can be used: 2 no answer"),
    "no file": ({"dataset": ["gone"]}, "gone.json: there is no such file"),
    "pool": (_select("random", update_step=20, max_steps=20), "picks update_step x global batch = 80 samples.*has 64"),
    "no model": ({"model_name_or_path": "nowhere"}, "model_name_or_path: no tokenizer at 'nowhere' .there is no such"),
    "empty model": ({"model_name_or_path": "empty"}, "model_name_or_path: no tokenizer at .*empty"),
    "no weights": ({"model_name_or_path": "bare"}, "no fitting weights at .*train_from_scratch: true"),
    "broken weights": ({"model_name_or_path": "cut"}, "no fitting weights at .*cut"),
    "target": ({"lora_target": "q_porj"}, r"lora_target: the model has no 'q_porj' \(did you mean 'q_proj'"),
    "saved": ({"additional_target": ["embed_token"]}, "additional_target: .*did you mean 'embed_tokens'"),
    "layers": (
        {"finetuning_type": "freeze", "freeze_trainable_layers": 9, "model_name_or_path": "model"},
        "freeze_trainable_layers: .* 2 layers; got 9",
    ),
    "range": (_select("out_of_range"), "'out_of_range' at step 0: sample id 1000 at position 0 is out of range"),
    "repeats": (_select("repeats"), "'repeats' at step 0: sample id 0 is returned 8 times"),
    "count": (_select("too_few"), "'too_few' at step 0: asked for 8 sample ids, got 1"),
    "nan": (_mix("nan"), "'nan' at step 0: proportion of 'a' is nan"),
    "shape": (_mix("too_many"), "'too_many' at step 0: needs 2 proportions .a, b., got shape"),
    "vector": (_select("vector") | {"train_type": "dynamic_weight"}, "'vector' at step 0: expected a scalar loss, got"),
    "syntax": ({"component_modules": ["syntax.py"]}, r"component_modules: .*syntax.py:3: invalid syntax"),
    "import": ({"component_modules": ["imports.py"]}, r"imports.py:2: No module named 'not_installed'"),
    "finite": ({"learning_rate": 1e30, "finetuning_type": "full"}, r"step 2: the losses of sample ids \[.*not finite"),
    "deepspeed key": ({"deepspeed": {"zero_optimization": {"stge": 2}}}, "deepspeed: .*stge: Extra inputs are not"),
    "optimizer": ({"deepspeed": {"optimizer": {"type": "AdamWW"}}}, "optimizer.type 'AdamWW'.*did you mean 'AdamW'"),
    "scheduler": ({"deepspeed": {"scheduler": {"type": "Cosine"}}}, "scheduler.type 'Cosine' is unknown; there are: "),
    "auto": (
        {"deepspeed": {"zero_optimization": {"allgather_bucket_size": "auto"}}},
        '"auto" of .* has no counterpart',
    ),
    "itself": ({"output_dir": "small"}, "output_dir: .* is also model_name_or_path"),
}


@pytest.fixture(scope="module")
def errors(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank says, by case."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(workspace / "data", folder / "data", ignore=shutil.ignore_patterns(".*"))
    for name in ("small", "bare", "cut"):
        shutil.copytree(workspace / "small", folder / name)
    shutil.copytree(workspace / "model", folder / "model")
    (folder / "empty").mkdir()
    (folder / "bare/model.safetensors").unlink()
    (folder / "cut/model.safetensors").write_bytes((folder / "small/model.safetensors").read_bytes()[:900])
    (folder / "syntax.py").write_text("import os\n\ndef f(:\n")
    (folder / "imports.py").write_text("import os\nimport not_installed\n")
    info = json.loads((folder / "data/dataset_info.json").read_text())
    info |= {"masked": {"file_name": "masked.json"}, "gone": {"file_name": "gone.json"}}
    (folder / "data/dataset_info.json").write_text(json.dumps(info))
    (folder / "data/masked.json").write_text(json.dumps([{"instruction": "a", "input": "", "output": ""}] * 2))
    cases = {}
    for name, (keys, _) in CASES.items():
        paths = {
            key: str(folder / keys[key])
            for key in ("model_name_or_path", "output_dir")
            if key in keys and keys[key] != "nowhere"
        }
        modules = [str(folder / m) for m in keys.get("component_modules", [])]
        keys = {**small(folder), "output_dir": None, **keys, **paths, "component_modules": modules or None}
        cases[name] = settings(folder, **keys)
    return run_ranks("tests.driver.ranks:sweep", 2, folder=str(folder), cases=cases)


@pytest.mark.parametrize("name", CASES)
def test_one_line_says_what_is_wrong(errors: list[dict[str, Any]], name: str) -> None:
    import re

    text = errors[0][name].get("error", "no error")
    assert re.search(CASES[name][1], text), text
    assert "\n" not in text
    assert errors[1][name] == errors[0][name]


def _config(tmp_path: Path, **changes: Any) -> Any:
    import yaml

    from dataflex.config import load_config

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path, model_name_or_path="x", **changes)))
    return load_config(path, quiet=True)


@pytest.mark.parametrize(
    ("keys", "package", "text"),
    [
        ({"plot_loss": True}, "matplotlib", "plot_loss: true needs matplotlib"),
        ({"report_to": "tensorboard"}, "tensorboard", "report_to: tensorboard needs the package tensorboard"),
        ({"report_to": "wandb"}, "wandb", "report_to: wandb needs the package wandb"),
    ],
)
def test_a_missing_package_is_said_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], package: str, text: str
) -> None:
    from dataflex import driver
    from dataflex.utils.errors import UserError

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    monkeypatch.setattr(driver, "_be_quiet", lambda: None)
    monkeypatch.setattr(driver, "_start_process_group", lambda cfg: pytest.fail("too late"))
    with pytest.raises(UserError, match=text):
        driver.run(_config(tmp_path, **keys))


@pytest.mark.parametrize("keys", [{"fp16": True}, {"deepspeed": {"fp16": {"enabled": True}}, "fp16": True}])
def test_fp16_is_refused_where_the_accelerator_lacks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    from deepspeed.accelerator import get_accelerator

    from dataflex.engine.ds_config import check_possible
    from dataflex.utils.errors import UserError

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: None)
    with pytest.raises(UserError, match="fp16: DeepSpeed refuses it on this accelerator.*use bf16"):
        check_possible(_config(tmp_path, **keys))
