"""Whole runs of two epochs by LLaMA-Factory's trainer and by dataflex: steps, rate and loss of each, packs.

A tiny random Llama on one process of the CPU. All samples are the same one but where they are packed, so that the order
of the samples makes no difference to the losses.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TYPES: dict[str, dict[str, Any]] = {
    "lora": {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"},
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
}
COMMON: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "template": "empty",
    "dataset": "same",
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
SAMPLES, PACKED_SAMPLES = 50, 600
PACKED = {"dataset": "rows", "cutoff_len": 256, "per_device_train_batch_size": 1}
_ONE_LESS = "there a pack holds one token less than cutoff_len"
WSD = {"lr_scheduler_type": "warmup_stable_decay"}


@dataclass(frozen=True)
class Case:
    """Keys over those of `COMMON`, null for one that is left out. why: of a difference that is meant.

    what: the rows of a batch, where they are no samples; then the losses depend on the order of the samples.
    """

    keys: dict[str, Any]
    why: str = ""
    what: str = ""

    @property
    def agrees(self) -> bool:
        """Whether steps and rates are to be equal."""
        return not self.why or bool(self.what)


CASES: dict[str, Case] = {
    "cosine, `warmup_ratio: 0.1`, accumulation 3": Case({}),
    "accumulation 1": Case({"gradient_accumulation_steps": 1}),
    "48 samples, whole batches": Case({"max_samples": 48}),
    "3 samples, less than a batch": Case({"max_samples": 3}),
    "no scheduler, batch or warm-up given": Case(
        {"lr_scheduler_type": None, "per_device_train_batch_size": None, "warmup_ratio": None}
    ),
    "linear, `warmup_steps: 3`": Case({"lr_scheduler_type": "linear", "warmup_ratio": None, "warmup_steps": 3}),
    "`warmup_steps: 0.2`": Case({"warmup_ratio": None, "warmup_steps": 0.2}),
    "`cosine_with_min_lr`": Case({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}}),
    "`warmup_stable_decay`": Case(WSD),
    "the same, `num_stable_steps: 4`": Case({**WSD, "lr_scheduler_kwargs": {"num_stable_steps": 4}}),
    "the same, `num_decay_steps: 5`": Case({**WSD, "lr_scheduler_kwargs": {"num_decay_steps": 5}}),
    "`inverse_sqrt`": Case({"lr_scheduler_type": "inverse_sqrt"}),
    "`max_steps: 7`": Case({"max_steps": 7}),
    "`max_steps: 25`, over the epochs": Case({"max_steps": 25}),
    "1.5 epochs": Case({"num_train_epochs": 1.5}),
    "1.1 epochs of 10 steps": Case({"num_train_epochs": 1.1, "gradient_accumulation_steps": 1, "max_samples": 20}),
    "`val_size: 0.13`": Case({"val_size": 0.13}),
    "`val_size: 8`": Case({"val_size": 8}),
    "`dataloader_drop_last: true`": Case(
        {"dataloader_drop_last": True, "per_device_train_batch_size": 4},
        why="no sample is left out: the key is ignored with a note",
    ),
    "stage `pt`": Case(
        {"stage": "pt", "dataset": "texts", "template": None},
        why="the last block, which is shorter, is trained on, too",
        what="blocks:",
    ),
    "`packing: true`": Case({**PACKED, "packing": True}, why=_ONE_LESS, what="packs:"),
    "`neat_packing: true`": Case({**PACKED, "neat_packing": True}, why=_ONE_LESS, what="packs:"),
}


def compare_runs(python: str, folder: Path, only: str = "") -> dict[str, Any]:
    """Train all cases whose name holds ``only``: {"versions": LLaMA-Factory's, "runs": [a row for each]}.

    python: of an environment with LLaMA-Factory.
    """
    base = _workspace(folder)
    given: dict[str, dict[str, Any]] = {}
    for name, case in CASES.items():
        for kind in TYPES if only in name else ():
            keys = {**COMMON, **base, **TYPES[kind], **case.keys}
            given[f"{name}|{kind}"] = {key: value for key, value in keys.items() if value is not None}
    there = _theirs(python, given, folder)
    rows = [
        {"case": name.split("|")[0], "type": name.split("|")[1], "there": there["runs"][name], "here": run}
        for name, run in _ours(given, folder)
    ]
    return {"versions": there["versions"], "runs": rows}


def table_of_runs(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: a line for each case, its types of finetuning together."""
    lines = [
        f"Each by {', '.join(TYPES)}: two epochs of {SAMPLES} samples in batches of 2 with accumulation 3 and a cosine "
        "schedule, where the case says nothing else. The rate and the loss of every step are compared, the latter "
        "where all samples are the same one, so that no order of theirs makes a difference.\n",
        "| case | steps there | steps here | learning rates | losses | |",
        "| --- " * 6 + "|",
    ]
    for name, case in CASES.items():
        runs = [row for row in rows if row["case"] == name]
        if not runs:
            continue
        there, here = (_each(run[side]["steps"] for run in runs) for side in ("there", "here"))
        rates = max(_apart(run, "rates") / max(run["there"]["rates"]) for run in runs)
        same = "equal" if rates < 1e-12 else f"within {rates:.2f} of the highest"
        losses = "" if case.what else f"within {max(_apart(run, 'losses') for run in runs):.0e}"
        sizes = _each(f"{case.what} {run['there']['rows']} there, {run['here']['rows']} here" for run in runs)
        why = "; ".join(filter(None, [sizes if case.what else "", case.why]))
        lines.append(f"| {name} | {there} | {here} | {same} | {losses} | {why} |")
    return lines


def kept_rates(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the tests compare with: LLaMA-Factory's rows of training data and rate of each step, of cases that agree."""
    return {
        row["case"]: {"rows": row["there"]["rows"], "rates": [float(f"{rate:.9g}") for rate in row["there"]["rates"]]}
        for row in rows
        if CASES[row["case"]].agrees
    }


def _each(values: Any) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _apart(run: dict[str, Any], what: str) -> float:
    return max(abs(a - b) for a, b in zip(run["there"][what], run["here"][what], strict=False))


def _workspace(folder: Path) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dataflex.demo.byte_tokenizer import VOCAB_SIZE, byte_tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = {
        "same": [{"instruction": "1 + 1", "input": "", "output": "It is 2."}] * SAMPLES,
        "texts": [{"instruction": "A text of 31 tokens, eos too.", "input": "", "output": ""}] * SAMPLES,
        "rows": [
            {"instruction": "x" * draw.randint(1, 60), "input": "", "output": "y" * draw.randint(1, 60)}
            for _ in range(PACKED_SAMPLES)
        ],
    }
    for name, content in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    info = {name: {"file_name": f"{name}.json"} for name in rows}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return {"model_name_or_path": str(folder / "model"), "dataset_dir": str(folder)}


def _theirs(python: str, given: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    runs, results = folder / "runs.json", folder / "results.json"
    keys = {name: {**run, "output_dir": str(folder / f"there-{i}")} for i, (name, run) in enumerate(given.items())}
    runs.write_text(json.dumps(keys))
    own = {"DISABLE_VERSION_CHECK": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(folder / "cache")}
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | own
    command = [python, str(Path(__file__).with_name("llamafactory_train.py")), str(runs), str(results)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    found: dict[str, Any] = json.loads(results.read_text())
    return found


def _ours(given: dict[str, dict[str, Any]], folder: Path) -> Any:
    """(name, what was seen) of each run, in this process."""
    from process_group import end_process, start_process

    from dataflex.config import load_config
    from dataflex.driver.setup import read_inputs, with_components
    from dataflex.driver.training import train
    from dataflex.report.trainer_log import read_log

    start_process()
    for i, (name, keys) in enumerate(given.items()):
        out = folder / f"here-{i}"
        cfg = load_config({**keys, "output_dir": str(out)}, quiet=True)
        train(cfg)
        inputs = read_inputs(with_components(cfg))
        lines = [line for line in read_log(out) if "lr" in line]
        yield (
            name,
            {
                "rows": inputs.data.train.size if inputs.packing is None else inputs.packing.pool.rows,
                "steps": lines[-1]["current_steps"],
                "rates": [line["lr"] for line in lines],
                "losses": [line["loss"] for line in lines],
            },
        )
    end_process()
