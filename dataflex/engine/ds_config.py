"""The DeepSpeed config of a run: "auto" values filled in from the YAML's keys."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from dataflex.config.trackers import check_installed, reported_to
from dataflex.utils.errors import UserError, nearest

if TYPE_CHECKING:
    from dataflex.config import Config

_MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "csv": "csv_monitor", "comet": "comet"}


def deepspeed_config(
    cfg: Config, *, world_size: int, hidden_size: int, total_steps: int, warmup_steps: int
) -> dict[str, Any]:
    """Return the config for `deepspeed.initialize`. UserError naming an "auto" that has no value here."""
    train = cfg.train
    config = train.deepspeed_config()
    values = {
        "train_batch_size": train.per_device_train_batch_size * train.gradient_accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": train.per_device_train_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.max_grad_norm,
        "bf16.enabled": train.bf16,
        "fp16.enabled": train.fp16,
        "zero_optimization.reduce_bucket_size": hidden_size * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
        "optimizer.params.lr": train.learning_rate,
        "optimizer.params.betas": [train.adam_beta1, train.adam_beta2],
        "optimizer.params.eps": train.adam_epsilon,
        "optimizer.params.weight_decay": train.weight_decay,
        "scheduler.params.warmup_min_lr": 0.0,
        "scheduler.params.warmup_max_lr": train.learning_rate,
        "scheduler.params.warmup_num_steps": max(1, warmup_steps),
        "scheduler.params.total_num_steps": total_steps,
    }
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        config.setdefault(key, "auto")
    for section in ("bf16", "fp16"):
        config.setdefault(section, {}).setdefault("enabled", "auto")
    config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("steps_per_print", 2**31)
    _fill(config, values, "")
    config["train_batch_size"] = values["train_batch_size"]
    if "optimizer" not in config:
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    elif not torch.cuda.is_available() and str(config["optimizer"].get("type", "")).lower() in (
        "adam",
        "adamw",
    ):
        config["optimizer"].setdefault("params", {}).setdefault("torch_adam", True)
    for name in reported_to(cfg):
        if name in _MONITORS:
            config.setdefault(_MONITORS[name], _monitor(name, cfg))
    return config


def check_possible(cfg: Config) -> None:
    """UserError for what this machine or installation lacks, before anything is read or loaded."""
    from deepspeed.accelerator import get_accelerator

    half = cfg.train.deepspeed_config().get("fp16", {}).get("enabled") is True
    if (cfg.train.fp16 or half) and not get_accelerator().is_fp16_supported():
        raise UserError("fp16: DeepSpeed refuses it on this accelerator (a CPU without fp16); use bf16: true or fp32")
    check_installed(cfg)


def _monitor(name: str, cfg: Config) -> dict[str, Any]:
    """DeepSpeed's settings for one monitor."""
    run_name = cfg.output.run_name or "dataflex"
    settings: dict[str, Any] = {"job_name": run_name, "output_path": cfg.output.output_dir}
    if name == "wandb":
        settings = {"project": "dataflex", "group": run_name}
    elif name == "comet":
        settings = {"experiment_name": run_name}
    return {"enabled": True, **settings, **(cfg.output.tracker_options or {}).get(name, {})}


def check_accepted(config: dict[str, Any]) -> None:
    """UserError with DeepSpeed's reason where it refuses the filled-in config; needs the process group."""
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(copy.deepcopy(config))
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"deepspeed: {exc.title}: {where}: {first['msg']}, got {first['input']!r}") from exc
    except (AssertionError, ValueError) as exc:
        raise UserError(f"deepspeed: {' '.join(str(exc).split())}") from exc
    optimizer = str(config.get("optimizer", {}).get("type", "AdamW"))
    if optimizer.lower() not in DEEPSPEED_OPTIMIZERS and not hasattr(torch.optim, optimizer):
        raise UserError(f"deepspeed: optimizer.type '{optimizer}' is unknown{nearest(optimizer, dir(torch.optim))}")
    scheduler = config.get("scheduler", {}).get("type", VALID_LR_SCHEDULES[0])
    if scheduler not in VALID_LR_SCHEDULES:
        valid = ", ".join(VALID_LR_SCHEDULES)
        raise UserError(f"deepspeed: scheduler.type '{scheduler}' is unknown; there are: {valid}")
    offloads = config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    if offloads and "optimizer" not in config and config["zero_force_ds_cpu_optimizer"]:
        raise UserError("deepspeed: zero_force_ds_cpu_optimizer: true needs an optimizer section in that config")


def given_config(engine: Any) -> dict[str, Any]:
    """The DeepSpeed config that an engine was made with, read where it was a file."""
    config: dict[str, Any] = engine._config._param_dict
    return config


def trained_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype that DeepSpeed gives the model, by a filled-in config."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return next((dtype for key, dtype in kinds.items() if config[key]["enabled"]), torch.float32)


def zero_stage(config: dict[str, Any]) -> int:
    return int(config["zero_optimization"]["stage"])


def _fill(node: dict[str, Any], values: dict[str, Any], prefix: str) -> None:
    for key, value in node.items():
        path = prefix + key
        if isinstance(value, dict):
            _fill(value, values, path + ".")
        elif value == "auto":
            if path not in values:
                raise UserError(f'deepspeed: "auto" of {path} has no counterpart in the YAML; write a value')
            node[key] = values[path]
