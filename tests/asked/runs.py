"""Rows whose fact is in the folder of a run: what was logged, evaluated, saved, kept and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from dataflex.driver.embedding import embed
from dataflex.driver.scoring import score
from dataflex.driver.training import train
from dataflex.report.trainer_log import read_log
from tests.asked.table import Build, Built, Row

COMMANDS = {"tokens": score, "neighbours": embed}


def run_all(folder: str) -> dict[str, Any]:
    """Train every build in turn; runs on each rank."""
    for build in BUILDS:
        COMMANDS.get(build.name, train)(build.config(Path(folder)))
    return {}


def log(b: Built, key: str) -> list[Any]:
    """(step, value) of the lines of the log that have ``key``."""
    return [[e["current_steps"], e[key]] for e in read_log(b.folder) if key in e]


def steps(b: Built, key: str = "loss") -> list[int]:
    return [step for step, _ in log(b, key)]


def checkpoints(b: Built) -> list[str]:
    return sorted(p.name for p in b.folder.glob("checkpoint-*"))


def has(*names: str) -> Any:
    return lambda b: [(b.folder / name).exists() for name in names]


def monitored(b: Built) -> list[str]:
    """What the monitor wrote of the loss, by its folder."""
    return sorted(p.relative_to(b.folder).as_posix() for p in b.folder.rglob("*loss.csv") if "eval" not in p.name)


def best(b: Built) -> list[Any]:
    """The step of the best checkpoint; whether the results are its, and the exported weights those saved then."""
    state = json.loads((b.folder / "trainer_state.json").read_text())
    results = json.loads((b.folder / "all_results.json").read_text())
    step, losses = state["best_global_step"], dict(log(b, "eval_loss"))
    of_it = losses[step] == state["best_metric"] == results["eval_loss"] and results["best_step"] == step
    saved = load_file(b.workspace / f"epochs/checkpoint-{step}/model.safetensors")
    exported = load_file(b.folder / "model.safetensors")
    same = all(torch.allclose(value, saved[name], rtol=1e-4, atol=1e-6) for name, value in exported.items())
    return [step, of_it, same and exported.keys() == saved.keys()]


FULL = {"finetuning_type": "full", "gradient_checkpointing": False, "save_steps": 500}
# 64 samples less 8, 4 in a step: 7 steps are half an epoch.
KEPT = Build(
    "kept",
    (
        Row("output_dir", "kept", has("all_results.json", "model.safetensors"), [True, True]),
        Row("logging_steps", 3, steps, [3, 6, 7]),
        Row("save_steps", 2, checkpoints, ["checkpoint-6", "checkpoint-7"]),
        Row("save_total_limit", 2, checkpoints, ["checkpoint-6", "checkpoint-7"]),
        Row("eval_strategy", "steps", lambda b: steps(b, "eval_loss"), [0, 4, 7]),
        Row("eval_steps", 4, lambda b: steps(b, "eval_loss"), [0, 4, 7]),
        Row("val_size", 8, lambda b: log(b, "epoch")[-1], [7, 0.5]),
        Row("plot_loss", True, has("training_loss.png"), [True]),
        Row("report_to", "csv", monitored, ["named/Train_dataflex_loss.csv"]),
        Row("run_name", "named", monitored, ["named/Train_dataflex_loss.csv"]),
    ),
    {**FULL, "max_steps": 7},
)
RESUMED = Build(
    "resumed",
    (Row("resume_from_checkpoint", "kept/checkpoint-6", checkpoints, ["checkpoint-7"]),),
    {**KEPT.more, **{row.key: row.value for row in KEPT.rows}, "output_dir": "resumed", "save_total_limit": None},
)
# 4 samples of each dataset, 4 in a step: an epoch is 2 steps.
EPOCHS = Build(
    "epochs",
    (
        Row("max_samples", 4, lambda b: log(b, "epoch")[-1], [5, 2.5]),
        Row("save_strategy", "epoch", checkpoints, ["checkpoint-2", "checkpoint-4", "checkpoint-5"]),
        Row(
            "save_only_model",
            True,
            has("checkpoint-2/model.safetensors", "checkpoint-2/latest", "latest"),
            [True, False, False],
        ),
        Row("eval_strategy", "epoch", lambda b: steps(b, "eval_loss"), [0, 2, 4, 5]),
        Row("load_best_model_at_end", True, best, [2, True, True]),
        Row("metric_for_best_model", "loss", best, [2, True, True]),
        Row("greater_is_better", True, best, [2, True, True]),
    ),
    {**FULL, "max_steps": 5, "eval_dataset": ["target"]},
)
# The same run from whole checkpoints under ZeRO-3; 0.35 of its steps are 1.75, rounded up.
BEST = Build(
    "best",
    (
        Row("save_total_limit", 1, checkpoints, ["checkpoint-2", "checkpoint-5"]),
        Row("load_best_model_at_end", True, best, [2, True, True]),
        Row("logging_steps", 0.35, steps, [2, 4, 5]),
    ),
    {
        **FULL,
        **{key: EPOCHS.more[key] for key in ("max_steps", "eval_dataset")},
        **dict.fromkeys(("save_strategy", "eval_strategy"), "epoch"),
        "max_samples": 4,
        "greater_is_better": True,
        "deepspeed": "ds_zero3.json",
    },
)
OVER = Build(
    "over",
    (
        Row("overwrite_output_dir", True, lambda b: [steps(b), checkpoints(b)], [[1], []]),
        Row("save_strategy", "no", checkpoints, []),
    ),
    {**FULL, "max_steps": 1, "output_dir": "epochs_again"},
)
AGAIN = Build("again", (), {**EPOCHS.more, "max_steps": 2, "output_dir": "epochs_again", "save_steps": 1})
DRY = Build("dry", (Row("dry_run", True, lambda b: b.folder.exists(), False),), FULL)
TOKENS = Build(
    "tokens",
    (Row("score_token_losses", True, has("token_losses/manifest.json"), [True]),),
    FULL,
)
NEIGHBOURS = Build(
    "neighbours",
    (Row("embed_neighbours", 3, lambda b: list(np.load(b.folder / "top_indices.npy").shape), [8, 3]),),
    {
        **FULL,
        "train_type": "dynamic_select",
        "component_name": "near",
        "eval_dataset": ["target"],
        "update_step": 2,
        "max_steps": None,
    },
)
BUILDS = (KEPT, RESUMED, EPOCHS, BEST, AGAIN, OVER, DRY, TOKENS, NEIGHBOURS)
