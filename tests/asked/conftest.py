"""A workspace with what the rows of the table name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.asked.commands import OWN_MODEL
from tests.driver.workspace import make_model, make_workspace
from tests.tiny import tiny_llama

OWN_PART = """
from dataflex.core.registry import register_selector
from dataflex.train.selector.base_selector import Selector


@register_selector("asked_own")
class AskedOwn(Selector):
    def select(self, model, step_id, num_samples, **kwargs):
        return list(range(num_samples))
"""


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workspace(tmp_path_factory.mktemp("asked"))
    make_model(folder / "other", seed=3)
    _make_adapter(folder / "adapter")
    entry = {"name": "less", "params": {"proj_dim": 96, "seed": 4, "projection": "sjlt"}}
    (folder / "own.yaml").write_text(yaml.safe_dump({"selectors": {"mine": entry}}))
    (folder / "own_part.py").write_text(OWN_PART)
    _make_data(folder / "data2")
    _make_own_model(folder / "own_code")
    return folder


def _make_data(folder: Path) -> None:
    """short: answers of 3, 5, 7, ... letters. turns: two turns each, with token weights. docs: plain text."""
    folder.mkdir()
    turns = [
        {"from": who, "value": text} for who, text in zip(["human", "gpt"] * 2, ["a", "bc", "d", "efg"], strict=True)
    ]
    rows: dict[str, list[dict[str, Any]]] = {
        "short": [{"instruction": f"Say {i}", "input": "", "output": "a" * (3 + 2 * i)} for i in range(6)],
        "turns": [{"conversations": turns, "w": [1, 2, 3, 4, 5, 6, 7]}] * 5,
        "docs": [{"text": f"doc {i}"} for i in range(9)],
    }
    more = {
        "turns": {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
        "docs": {"columns": {"prompt": "text"}},
    }
    info = {name: {"file_name": f"{name}.json", **more.get(name, {})} for name in rows}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for name, content in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def _make_own_model(folder: Path) -> None:
    """A model whose class is in its own folder."""
    make_model(folder)
    (folder / "own.py").write_text(OWN_MODEL)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own_of_the_user",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))


def _make_adapter(folder: Path) -> None:
    """Rank 2 and alpha 3, with 0.125 in each B."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an older name
        adapted = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.125)
    adapted.save_pretrained(folder)
