"""Rows whose fact is on the engine: model, optimizer and learning rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataflex.core.plan import generator
from dataflex.utils import dist
from tests.asked.engine_facts import (
    adapted,
    every,
    first_values,
    lengths_apart,
    noise,
    of_groups,
    of_lora,
    parameters,
    plan,
    rates,
    rates_of_lora,
    recomputes,
    reentrant,
    rows_of_evaluation,
    trained,
)
from tests.asked.table import Build, Built, Row

DOWN = "layers.1.mlp.down_proj.weight"
FULL = {"finetuning_type": "full", "gradient_checkpointing": False}


def seeded(name: str) -> Callable[[Path], list[float]]:
    """The first numbers of a parameter of a new model that is made after seed 5."""

    def values(workspace: Path) -> list[float]:
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(workspace / "model"))
        return next(p.flatten()[:4].tolist() for n, p in model.named_parameters() if n.endswith(name))

    return values


def saved(model: str, name: str) -> Callable[[Path], list[float]]:
    """The first numbers of a parameter in a folder of the workspace."""

    def values(workspace: Path) -> list[float]:
        from safetensors import safe_open

        with safe_open(workspace / model / "model.safetensors", "pt") as file:
            return file.get_tensor(f"model.{name}").flatten()[:4].tolist()

    return values


def ordered_by(seed: int, size: int) -> list[int]:
    """The order of the first pass over a pool."""
    return generator(seed, "epoch", 0).permutation(size).tolist()


# 7 steps, of which 0.3 are 2.1, so that the rate rises in 3 and falls in 4: to (1 + cos(k pi / 8)) / 2 of it, since
# num_cycles is a quarter, not a half.
SIZES = [f"size_{size}" for size in range(8)]  # of the target's eight rows
COSINE = [0.0, 1e-3, 2e-3, 3e-3, 2.8858192987669e-3, 2.5606601717798e-3, 2.0740251485476e-3, 1.5e-3]
TRAINING = Build(
    "training",
    (
        Row("finetuning_type", "full", lambda b: all(p.requires_grad for p in parameters(b).values()), True),
        Row("train_from_scratch", True, lambda b: first_values(b, DOWN), seeded(DOWN)),
        Row(
            "seed",
            5,
            lambda b: [b.engine.run.seed, torch.initial_seed() - dist.rank(), first_values(b, "lm_head.weight")],
            lambda w: [5, 5, seeded("lm_head.weight")(w)],
        ),
        Row("flash_attn", "disabled", lambda b: b.engine.module.config._attn_implementation, "eager"),
        Row("gradient_checkpointing", False, recomputes, False),
        Row(
            "optim",
            "adamw_torch_fused",
            lambda b: [type(b.engine.optimizer).__name__, every(b, "fused")],
            ["AdamW", True],
        ),
        Row("adam_beta1", 0.7, lambda b: every(b, "betas")[0], 0.7),
        Row("adam_beta2", 0.92, lambda b: every(b, "betas")[1], 0.92),
        Row("adam_epsilon", 3e-5, lambda b: every(b, "eps"), 3e-5),
        Row(
            "weight_decay",
            0.03,
            lambda b: [
                of_groups(b, "weight_decay")[n] for n in ("lm_head.weight", f"model.{DOWN}", "model.norm.weight")
            ],
            [0.03, 0.03, 0.0],
        ),
        Row("learning_rate", 3e-3, lambda b: of_groups(b, "initial_lr")["lm_head.weight"], 3e-3),
        Row(
            "layer_lr_multipliers",
            {"layers.1": 0.5, "mlp": 4.0},
            lambda b: [
                of_groups(b, "initial_lr")[f"model.layers.{at}.weight"]
                for at in ("1.mlp.up_proj", "1.self_attn.q_proj", "0.mlp.up_proj")
            ],
            [6e-3, 1.5e-3, 12e-3],
        ),
        Row("lr_scheduler_type", "cosine", rates, COSINE),
        Row("lr_scheduler_kwargs", {"num_cycles": 0.25}, rates, COSINE),
        Row("warmup_ratio", 0.3, lambda b: int(np.argmax(rates(b))), 3),
        Row("max_steps", 7, lambda b: b.engine.run.total_steps, 7),
        Row("max_grad_norm", 0.37, lambda b: b.engine.gradient_clipping(), 0.37),
        Row(
            "per_device_train_batch_size",
            3,
            lambda b: [b.engine.train_micro_batch_size_per_gpu(), plan(b).shape[1]],
            [3, 12],
        ),
        Row(
            "gradient_accumulation_steps",
            2,
            lambda b: [b.engine.gradient_accumulation_steps(), b.engine.train_batch_size()],
            [2, 12],
        ),
        Row("per_device_eval_batch_size", 3, rows_of_evaluation, 3),
        Row(
            "eval_dataset",
            ["target"],
            lambda b: [b.engine.eval_pool.domain_names, len(b.engine.eval_pool)],
            [["target"], 8],
        ),
        Row("subtask_column", "size", lambda b: [name for name, _ in b.engine._eval_parts(b.engine.eval_pool)], SIZES),
        Row("dataloader_num_workers", 1, lambda b: b.engine._loop.source.workers, 1),
        Row("group_by_length", True, lengths_apart, True),
        Row("nonfinite", "skip", lambda b: b.engine._loop.stepper.nonfinite.policy, "skip"),
        Row("nonfinite_limit", 3, lambda b: b.engine._loop.stepper.nonfinite.limit, 3),
        Row("neftune_noise_alpha", 6.0, noise, [True, True, 0.0]),
        Row("tf32", True, lambda b: torch.backends.cuda.matmul.allow_tf32, True),
        Row("fused_head", "on", lambda b: b.engine._loop.stepper._losses.fused.always, True),
        Row("scoring_batch_tokens", 321, lambda b: b.engine.scorer.token_budget, 321),
    ),
)
LORA = Build(
    "lora",
    (
        Row(
            "model_name_or_path",
            "other",
            lambda b: first_values(b, "layers.1.mlp.up_proj.weight"),
            saved("other", "layers.1.mlp.up_proj.weight"),
        ),
        Row("lora_rank", 3, lambda b: of_lora(b, "rank"), [3]),
        Row("lora_alpha", 7, lambda b: of_lora(b, "scaling"), [7 / 3**0.5]),
        Row("use_rslora", True, lambda b: of_lora(b, "scaling"), [7 / 3**0.5]),
        Row("loraplus_lr_ratio", 8.0, rates_of_lora, {"lora_A": [1e-3], "lora_B": [8e-3], "whole": [1e-3]}),
        Row("lora_dropout", 0.25, lambda b: of_lora(b, "dropout"), [0.25]),
        Row("lora_target", ["q_proj", "down_proj"], adapted, ["down_proj", "q_proj"]),
        Row(
            "additional_target",
            ["embed_tokens"],
            lambda b: [name for name in trained(b) if "lora" not in name],
            ["base_model.model.model.embed_tokens.modules_to_save.default.weight"],
        ),
        Row("use_reentrant_gc", False, reentrant, [False]),
        Row("data_seed", 9, lambda b: plan(b).flatten().tolist(), ordered_by(9, 64)),
        Row("num_train_epochs", 2.5, lambda b: b.engine.run.total_steps, 40),
        Row("warmup_steps", 5, lambda b: [rates(b)[1], int(np.argmax(rates(b))), rates(b)[5]], [2e-4, 5, 1e-3]),
    ),
    {"max_steps": None},
)
HALF = Build(
    "half",
    (
        Row(
            "bf16",
            True,
            lambda b: [str(next(iter(parameters(b).values())).dtype), b.engine.bfloat16_enabled()],
            ["torch.bfloat16", True],
        ),
        Row(
            "adapter_name_or_path",
            "adapter",
            lambda b: [of_lora(b, "rank"), of_lora(b, "scaling"), of_lora(b, "B")],
            [[2], [1.5], [0.125]],
        ),
        Row("deepspeed", {"zero_optimization": {"stage": 2}}, lambda b: b.engine.zero_optimization_stage(), 2),
    ),
)
FREEZE = Build(
    "freeze",
    (
        Row(
            "freeze_trainable_layers",
            -1,
            lambda b: sorted({name.split(".")[2] for name in trained(b) if ".layers." in name}),
            ["0"],
        ),
        Row(
            "freeze_extra_modules",
            ["norm"],
            lambda b: [name for name in trained(b) if ".layers." not in name],
            ["model.norm.weight"],
        ),
        Row(
            "freeze_trainable_modules",
            ["mlp"],
            lambda b: sorted(name.split("0.")[-1] for name in trained(b) if "0." in name),
            [f"mlp.{p}_proj.weight" for p in ("down", "gate", "up")],
        ),
        Row(
            "new_special_tokens",
            ["<x>", "<y>"],
            lambda b: [
                b.inputs.tokenizer.convert_tokens_to_ids("<y>"),
                len(parameters(b)["lm_head.weight"]),
                b.engine.module.config.vocab_size,
            ],
            [260, 261, 261],
        ),
        Row("disable_gradient_checkpointing", True, recomputes, False),
    ),
    {"finetuning_type": "freeze", "gradient_checkpointing": True},
)
AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            **dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
            "warmup_type": "linear",
        },
    },
}
RESOLVED: dict[str, Any] = {
    "train_batch_size": 12,
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.6,
    "bf16": {"enabled": False},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": 1024,
        "stage3_prefetch_bucket_size": 921,
        "stage3_param_persistence_threshold": 320,
    },
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 2e-3, "betas": [0.8, 0.97], "eps": 1e-6, "weight_decay": 0.02, "torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": 0.0,
            "warmup_max_lr": 2e-3,
            "warmup_num_steps": 2,
            "total_num_steps": 4,
            "warmup_type": "linear",
        },
    },
}


def resolved(b: Built) -> list[Any]:
    """The DeepSpeed config as it was filled in, and what DeepSpeed's optimizer and schedule made of it."""
    given = {key: value for key, value in b.engine._config._param_dict.items() if key in AUTO}
    groups = b.engine.optimizer.param_groups
    made = [[list(g["betas"]), g["eps"], g["weight_decay"], g["lr"]] for g in groups]
    return [given, made, b.engine.gradient_clipping(), b.engine.train_batch_size()]


AUTOS = Build(
    "autos",
    (Row("deepspeed", AUTO, resolved, [RESOLVED, [[[0.8, 0.97], 1e-6, 0.02, 0.0]], 0.6, 12]),),
    {
        **FULL,
        "learning_rate": 2e-3,
        "adam_beta1": 0.8,
        "adam_beta2": 0.97,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.02,
        "max_grad_norm": 0.6,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "warmup_ratio": 0.3,
    },
)
