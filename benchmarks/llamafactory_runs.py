"""Whole runs of two epochs by both programs: steps, the learning rate of each, packs.

A tiny random Llama on one CPU process. LLaMA-Factory's own training function (`run_sft`) trains, with transformers'
Trainer; ``python llamafactory_runs.py CONFIG.json`` is one of its runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMON: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "template": "default",
    "dataset": "rows",
    "cutoff_len": 96,
    "num_train_epochs": 2.0,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "save_strategy": "no",
    "report_to": "none",
    "seed": 7,
}
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}
RUNS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "lora, defaults": {**LORA, "lr_scheduler_type": None, "per_device_train_batch_size": None, "warmup_ratio": None},
    "lora, packing": {**LORA, "packing": True, "neat_packing": True, "per_device_train_batch_size": 1},
}
ROWS = 50


def compare_runs() -> list[dict[str, Any]]:
    """One row a run: what, steps and learning rates of both."""
    with tempfile.TemporaryDirectory() as folder:
        base = _workspace(Path(folder))
        found = []
        for name, settings in RUNS.items():
            given = {k: v for k, v in {**COMMON, **base, **settings}.items() if v is not None}
            there = _logged(given | {"output_dir": f"{folder}/lf-{name}"}, _run_theirs)
            here = _logged(given | {"output_dir": f"{folder}/df-{name}"}, _run_ours)
            found.append({"run": name, "there": there, "here": here})
            print(name, len(there), len(here), flush=True)
    return found


def table_of_runs(found: list[dict[str, Any]]) -> list[str]:
    """Markdown: steps, and the largest difference of a step's learning rate relative to the peak."""
    lines = ["| run of 2 epochs | steps there | steps here | learning rates |", "| --- | --- | --- | --- |"]
    for row in found:
        there, here = row["there"], row["here"]
        apart = [abs(a - b) for a, b in zip(there, here, strict=False)]
        same = f"within {max(apart) / max(there):.0e} of the highest" if max(apart) else "equal"
        lines.append(f"| {row['run']} | {len(there)} | {len(here)} | {same} |")
    return lines


def _workspace(folder: Path) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dataflex.demo.byte_tokenizer import byte_tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=259, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    rows = [{"instruction": "x" * (1 + 7 * i % 40), "output": "y" * (1 + 5 * i % 31)} for i in range(ROWS)]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}')
    return {"model_name_or_path": str(folder / "model"), "dataset_dir": str(folder)}


def _logged(settings: dict[str, Any], run: Any) -> list[float]:
    """The learning rate that each step was made with."""
    out = Path(settings["output_dir"])
    config = out.with_suffix(".json")
    config.write_text(json.dumps(settings))
    run(config)
    lines = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    return [line["lr"] for line in lines if "loss" in line and "lr" in line]


def _run_theirs(config: Path) -> None:
    _call([sys.executable, __file__, str(config)], DISABLE_VERSION_CHECK="1", CUDA_VISIBLE_DEVICES="")


def _run_ours(config: Path) -> None:
    _call([sys.executable, "-m", "dataflex.cli", "train", str(config)])


def _call(command: list[str], **variables: str) -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **variables})
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )


def _train_there(config: str) -> None:
    from llamafactory_side import load

    load()
    from llamafactory.hparams import get_train_args
    from llamafactory.train.callbacks import LogCallback
    from llamafactory.train.sft.workflow import run_sft

    given = json.loads(Path(config).read_text())
    run_sft(*get_train_args({**given, "use_cpu": True}), callbacks=[LogCallback()])


if __name__ == "__main__":
    _train_there(sys.argv[1])
