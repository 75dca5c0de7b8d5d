"""A folder with all that a run needs: a tiny model, generated alpaca data, and the settings that name them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.distributed import PATIENCE_S, ROOT
from tests.tiny import byte_tokenizer, tiny_llama, tiny_mixtral

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}> {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}> {% endif %}"
)
SIZES = {"a": 40, "b": 24, "target": 8}
# The packaged file's, but ZeRO-3 looks ahead by one layer: it goes through all modules for each module otherwise.
ZERO3: dict[str, Any] = json.loads((ROOT / "configs/ds_zero3.json").read_text())
ZERO3["zero_optimization"]["stage3_max_reuse_distance"] = 4096


def make_model(folder: Path, **overrides: Any) -> None:
    """Save a random tiny Llama and the byte tokenizer."""
    tiny_llama(initializer_range=0.08, **overrides).save_pretrained(folder)
    byte_tokenizer(TEMPLATE).save_pretrained(folder)


def make_workspace(folder: Path) -> Path:
    """Write model/, small/, tied/, moe/ and data/ into ``folder`` and return it."""
    make_model(folder / "model")
    make_model(folder / "small", num_hidden_layers=1)
    make_model(folder / "tied", tie_word_embeddings=True)
    tiny_mixtral().save_pretrained(folder / "moe")
    byte_tokenizer(TEMPLATE).save_pretrained(folder / "moe")
    data = folder / "data"
    data.mkdir()
    draw = np.random.default_rng(0)
    info: dict[str, Any] = {}
    for name, size in SIZES.items():
        rows = [
            {
                "instruction": f"add {i} {draw.integers(99)}",
                "input": "x" * int(draw.integers(30)),
                "output": str(i * 37),
                "size": i % 8,
            }
            for i in range(size)
        ]
        (data / f"{name}.json").write_text(json.dumps(rows))
        info[name] = {"file_name": f"{name}.json"}
    texts = [{"text": " ".join(str(n) for n in draw.integers(0, 999, 12))} for _ in range(40)]
    (data / "text.json").write_text(json.dumps(texts))
    info["text"] = {"file_name": "text.json", "columns": {"prompt": "text"}}
    (data / "dataset_info.json").write_text(json.dumps(info))
    return folder


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """The flat YAML keys of a short LoRA run under ZeRO-3 in ``folder``, with ``changes``."""
    base = {
        "model_name_or_path": str(folder / "model"),
        "dataset_dir": str(folder / "data"),
        "dataset": ["a", "b"],
        "cutoff_len": 128,
        "output_dir": str(folder / "out"),
        "logging_steps": 1,
        "save_steps": 4,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "cosine",
        "learning_rate": 1e-3,
        "max_steps": 4,
        "deepspeed": "ds_zero3.json",
    }
    return {key: value for key, value in (base | changes).items() if value is not None}


def small(folder: Path) -> dict[str, Any]:
    """Keys of a LoRA run in which it does not matter what is adapted: ZeRO-3's time goes with the number of modules."""
    return {"model_name_or_path": str(folder / "small"), "lora_target": ["q_proj", "down_proj"]}


def write_yaml(folder: Path, name: str, **changes: Any) -> Path:
    """Write `settings` to ``folder``/``name``."""
    path = folder / name
    path.write_text(yaml.safe_dump(settings(folder, **changes)))
    return path


def train(config: Path, *overrides: str, ranks: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """``dataflex-cli train`` as a user starts it, under the launcher; stdout and stderr together."""
    return launched("train", config, *overrides, ranks=ranks, **environment)


def launched(
    name: str, config: Path, *overrides: str, ranks: int = 2, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``dataflex-cli`` with the command ``name``, likewise."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "PYTHONWARNINGS")}
    env = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "dataflex.cli", name, str(config), *overrides, f"--num_processes={ranks}"]
    return subprocess.run(
        command,
        env=env | environment,
        cwd=config.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE_S,
        check=False,
    )
