"""Rows whose fact is on what a command makes of its config, without an engine. In one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors import safe_open

from dataflex import driver
from dataflex.data.chosen import Cost
from dataflex.data.load import load_data
from dataflex.data.sources.info import find_dataset_dir, read_dataset_infos
from dataflex.data.sources.rows import content_of
from dataflex.driver import doremi, scores
from dataflex.driver.exporting import export_model
from dataflex.driver.selecting import select
from dataflex.driver.setup import stop_of
from dataflex.engine.ds_config import deepspeed_config
from dataflex.engine.models.model import load_model, load_model_config, load_tokenizer
from dataflex.scoring.decide.topk import FEATURES
from dataflex.scoring.kept.store import ShardStore
from tests.asked.table import Build, Built, Row

OWN_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_of_the_user"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def timeout(b: Built) -> float:
    """Seconds that the process group is started with."""
    with mock.patch("deepspeed.init_distributed") as started:
        driver._start_process_group(b.cfg)
    return float(started.call_args.kwargs["timeout"].total_seconds())


def filled(b: Built) -> dict[str, Any]:
    """The DeepSpeed config of a run on one process."""
    return deepspeed_config(b.cfg, world_size=1, hidden_size=32, total_steps=1, warmup_steps=0)


def half(b: Built) -> list[Any]:
    """What of a run in fp16 is right where there is no engine for it: its DeepSpeed config and the model."""
    config = filled(b)
    return [config["fp16"], config["bf16"], str(next(model(b).parameters()).dtype)]


def model(b: Built) -> torch.nn.Module:
    return load_model(b.cfg, load_model_config(b.cfg), load_tokenizer(b.cfg))


def proxy(b: Built) -> list[Any]:
    """Model and steps of the reference, the proxy and the final run."""
    runs = [doremi.reference_run(b.cfg), doremi.proxy_run(b.cfg), doremi.final_run(b.cfg, [0.5, 0.5])]
    return [[Path(run.model.model_name_or_path).name, run.fixed_steps] for run in runs]


def chosen(b: Built) -> list[int]:
    """The ids of the samples that `select` writes, of each dataset's file in turn."""
    select(b.cfg)
    found = []
    for name in b.cfg.data.dataset:
        path = Path(b.cfg.score.select_dir or "") / f"{name}.jsonl"
        found += [json.loads(line)["dataflex_id"] for line in path.read_text().splitlines()]
    return found


def write_scores(build: Build, workspace: Path) -> None:
    """Folders of scores of a and b. one: each sample's id. two: 100 for ids 39 and 63, else 0. three: of two subtasks,
    as one, and 1 for id 5.

    The features of the first are all different, but for those of 62 and 63.
    """
    cfg = build.config(workspace)
    pool: Any = load_data(cfg, load_tokenizer(cfg)).train
    ids = np.arange(64, dtype=np.int64)
    store = ShardStore(workspace / "one/features", {"of": "asked"}, ids, 64)
    features = np.eye(64, dtype=np.float16)
    features[62] = features[63]
    store.write(0, {FEATURES: features})
    infos = read_dataset_infos(pool.domain_names, find_dataset_dir(cfg.data.dataset_dir, cfg.source))
    each = np.stack([ids, ids == 5], axis=1).astype(np.float32)
    for name, values in (("one", ids), ("two", np.where(np.isin(ids, (39, 63)), 100, 0)), ("three", ids)):
        facts = scores.Facts(
            pool=pool.fingerprint,
            domains=pool.domain_names,
            contents=[content_of(info) for info in infos],
            component="less",
            checkpoint=None,
            step=0,
            learning_rate=None,
            features=str(workspace / "one/features") if name == "one" else None,
            cost=Cost(selection_seconds=1.0),
            subtasks=["x", "y"] if name == "three" else [],
        )
        scores.write(workspace / name, facts, pool, each if name == "three" else values.astype(np.float32)[:, None])


START = Build(
    "start",
    (
        Row("ddp_timeout", 77, timeout, 77.0 + 4 * 5.0),  # four beats more, in which the watch speaks first
        Row("max_hours", 1.5, lambda b: stop_of(b.cfg).max_hours, 1.5),
        Row("stop_grace_seconds", 9, lambda b: stop_of(b.cfg).grace_s, 9.0),
        Row("fp16", True, half, [{"enabled": True}, {"enabled": False}, "torch.float16"]),
        Row("tracker_options", {"csv": {"job_name": "mine"}}, lambda b: filled(b)["csv_monitor"]["job_name"], "mine"),
        Row("trust_remote_code", True, lambda b: type(model(b)).__name__, "OwnModel"),
    ),
    {
        "model_name_or_path": "own_code",
        "finetuning_type": "full",
        "gradient_checkpointing": False,
        "report_to": "csv",
    },
)
GROWN = Build(
    "grown",
    (
        Row(
            "resize_vocab",
            True,
            lambda b: sorted(
                name.split(".modules")[0].rsplit(".", 1)[-1]
                for name, p in model(b).named_parameters()
                if p.requires_grad and "lora" not in name
            ),
            ["embed_tokens", "lm_head"],
        ),
    ),
)


def exported(b: Built) -> list[Any]:
    """Whether the weights are in several files, and their dtype."""
    folder = Path(b.cfg.export.export_dir or "")
    if not folder.exists():
        export_model(b.cfg)
    files = sorted(folder.glob("*.safetensors"))
    with safe_open(files[0], "pt") as file:
        return [len(files) > 2, str(file.get_tensor(next(iter(file.keys()))).dtype)]


MERGED = Build(
    "merging",
    tuple(
        Row(key, value, exported, [True, "torch.bfloat16"])
        for key, value in (("export_dir", "merged"), ("export_size", 1e-5), ("infer_dtype", "bfloat16"))
    ),
    {"adapter_name_or_path": "adapter"},
)
PROXY = Build(
    "proxy",
    (
        Row("proxy_model_name_or_path", "tied", proxy, [["tied", 3], ["tied", 3], ["model", 8]]),
        Row("proxy_train_step", 3, proxy, [["tied", 3], ["tied", 3], ["model", 8]]),
    ),
    {"train_type": "dynamic_mix", "component_name": "doremi", "update_step": 2, "train_step": 8, "max_steps": None},
)
CHOOSE = Build(
    "choose",
    (
        Row("select_from", ["one", "two"], chosen, [38, 37, 36, 35, 62]),
        Row("select_weights", [1, -2], chosen, [38, 37, 36, 35, 62]),
        Row("select_count", 5, chosen, [38, 37, 36, 35, 62]),
        Row("select_quotas", {"a": 4, "b": 1}, chosen, [38, 37, 36, 35, 62]),
        Row("select_dir", "chosen", chosen, [38, 37, 36, 35, 62]),
    ),
)
UNLIKE = Build(
    "unlike",
    (
        Row("select_fraction", 0.05, chosen, [63, 61, 60]),
        Row("select_duplicates", 0.9, chosen, [63, 61, 60]),
    ),
    {"select_from": ["one"], "select_dir": "unlike"},
)
IN_TURN = Build(
    "in turn",
    (Row("select_aggregate", "round_robin", chosen, [5, 63]),),
    {"select_from": ["three"], "select_count": 2, "select_dir": "in_turn"},
)
BUILDS = (START, GROWN, MERGED, PROXY, CHOOSE, UNLIKE, IN_TURN)
