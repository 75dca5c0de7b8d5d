"""From a checked config to an engine with its data: what every command that runs a model starts with."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataflex.config import Config
from dataflex.config.components import component_params
from dataflex.config.paths import resolve
from dataflex.config.rules.packing import shares_rows
from dataflex.core.hook import Hook
from dataflex.core.packing import Packing
from dataflex.core.plan import Schedule
from dataflex.core.registry import REGISTRY
from dataflex.data.chosen import Chosen, read_chosen, with_chosen_data
from dataflex.data.encoding.collate import Collator
from dataflex.data.load import LoadedData, load_data, load_pool
from dataflex.data.pool import Pool, describe_sample
from dataflex.data.sources.info import find_dataset_dir
from dataflex.engine.ds_config import check_accepted, deepspeed_config, trained_dtype, zero_stage
from dataflex.engine.models import lora
from dataflex.engine.models.adapter import with_adapter_keys
from dataflex.engine.models.handover import Handover, handover
from dataflex.engine.models.model import load_model, load_model_config, load_tokenizer
from dataflex.engine.optimizer import forget_dry_step, make_optimizer, make_scheduler, warmup_steps
from dataflex.engine.plugin import DataflexEngine
from dataflex.train.trainer.build import attach, make_schedule, packing_of, pass_rows
from dataflex.train.trainer.components import load_components, subtask_column, with_effective_params
from dataflex.train.trainer.without_model import WithoutModel, attach_without_model
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger
from dataflex.utils.stopping import Stop


@dataclass(frozen=True)
class Inputs:
    """What a run reads before its model: everything that can be wrong is found here.

    chosen: what `dataflex-cli select` says of the data, where it is its.
    """

    cfg: Config
    tokenizer: Any
    model_config: Any
    data: LoadedData
    schedule: Schedule
    handover: Handover
    packing: Packing | None = None
    chosen: Chosen | None = None


def with_components(cfg: Config) -> Config:
    """Register the components and fill in their params; an adapter brings its own keys.

    model_name_or_path may mean a packaged model folder, and dataset_dir a folder of `dataflex-cli select`.
    """
    load_components(cfg.flex.component_modules)
    return with_chosen_data(with_adapter_keys(_with_attention(with_packaged_model(with_effective_params(cfg)))))


def read_inputs(cfg: Config) -> Inputs:
    """Tokenizer, model config, data and schedule of a config from `with_components`; a collective."""
    tokenizer = load_tokenizer(cfg)
    model_config = load_model_config(cfg)
    lora.check_ahead(cfg, model_config)
    data = load_data(cfg, tokenizer, subtask_column(cfg))
    packing = packing_of(cfg, data.train)
    pool_rows = data.train.size if packing is None else packing.pool.rows
    schedule = _schedule(cfg, pass_rows(cfg, data.train, packing), pool_rows)
    _say_data(data, tokenizer)
    chosen = read_chosen(find_dataset_dir(cfg.data.dataset_dir, cfg.source))
    return Inputs(cfg, tokenizer, model_config, data, schedule, handover(cfg, model_config), packing, chosen)


def stop_of(cfg: Config) -> Stop:
    """When a run of ``cfg`` under our command line is to end."""
    return Stop(heeds=True, grace_s=cfg.output.stop_grace_seconds, max_hours=cfg.output.max_hours)


def with_packaged_model(cfg: Config) -> Config:
    """Let model_name_or_path mean a packaged model folder, as configs/models/tiny_llama."""
    name = cfg.model.model_name_or_path
    if not name.startswith("configs/") or Path(name).exists():
        return cfg
    model = cfg.model.model_copy(update={"model_name_or_path": str(resolve(name))})
    return cfg.model_copy(update={"model": model})


def _with_attention(cfg: Config) -> Config:
    """sdpa in the place of fa2 where its package is not installed, as LLaMA-Factory goes on without it."""
    if cfg.model.flash_attn != "fa2" or importlib.util.find_spec("flash_attn") is not None:
        return cfg
    logger.warning("flash_attn: fa2 needs the package flash_attn, which is not installed; sdpa is used")
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"flash_attn": "sdpa"})})


def _schedule(cfg: Config, pass_size: int | None, pool_size: int | None) -> Schedule:
    """The run's schedule, checked against the pool before any model is loaded. Sizes are rows."""
    train = cfg.train
    global_batch = train.per_device_train_batch_size * train.gradient_accumulation_steps * dist.world_size()
    schedule = make_schedule(
        cfg.flex,
        pool_size=pass_size,
        global_batch=global_batch,
        epochs=train.num_train_epochs,
        fixed=cfg.fixed_steps,
    )
    if "select" in cfg.flex.kinds:
        assert pool_size is not None, "the configuration refuses selection from streams"
        name, params = component_params(cfg.flex, "select")
        with_replacement = params.get("replacement", getattr(REGISTRY.get("selector", name), "replacement", False))
        asked = max((p.steps for p in schedule.phases if p.decides), default=0) * global_batch
        if asked > pool_size and not with_replacement:
            rows = "packs" if shares_rows(cfg) else "samples"
            raise UserError(
                f"update_step: a decision picks update_step x global batch = {asked:,} {rows} without replacement, "
                f"the pool has {pool_size:,}; lower update_step or the batch size"
            )
    return schedule


def _say_data(data: LoadedData, tokenizer: Any) -> None:
    for line in data.report.lines():
        logger.info(line)
    logger.info(describe_sample(data.train, 0, tokenizer))


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_engine(inputs: Inputs, hooks: Sequence[Hook] = (), trains: bool = True) -> DataflexEngine:
    """Model, optimizer and engine. Under ZeRO-3 the model is partitioned while it is made. A collective.

    hooks: called after the components' own. trains: False for an engine without optimizer, to evaluate with.
    """
    import deepspeed

    cfg, tokenizer, total_steps = inputs.cfg, inputs.tokenizer, inputs.schedule.total_steps
    _seed_everything(cfg.train.seed)
    config = _filled_config(inputs)
    if not trains:
        _without_optimizer(config)
    check_accepted(config)
    partitioning = _partition_while_loading(config)
    model = dist.together(lambda: load_model(cfg, inputs.model_config, tokenizer))
    arguments = _optimizer(cfg, model, config, total_steps) if trains else {}
    engine, *_ = deepspeed.initialize(model=model, config=config, **arguments)
    del partitioning
    forget_dry_step(engine)
    wrapped = attach(
        engine,
        cfg=cfg,
        pool=inputs.data.train,
        eval_pool=inputs.data.eval,
        mixer_eval_pool=_mixer_eval_pool(cfg, tokenizer),
        collator=_collator(cfg, tokenizer),
        tokenizer=tokenizer,
        hooks=hooks,
        workers=0 if cfg.data.streaming else cfg.data.dataloader_num_workers,
        packing=inputs.packing,
    )
    torch.manual_seed(cfg.train.seed + dist.rank())
    return wrapped


def without_model(inputs: Inputs) -> WithoutModel:
    """A selector with a model of its own, in place of an engine; its model has the dtype that one would have."""
    from deepspeed.accelerator import get_accelerator

    cfg, pool = inputs.cfg, inputs.data.train
    assert isinstance(pool, Pool)
    return attach_without_model(
        cfg,
        pool=pool,
        target=inputs.data.eval,
        collator=_collator(cfg, inputs.tokenizer),
        tokenizer=inputs.tokenizer,
        packing=inputs.packing,
        device=torch.device(get_accelerator().current_device_name()),
        dtype=trained_dtype(_filled_config(inputs)),
    )


def _filled_config(inputs: Inputs) -> dict[str, Any]:
    """The DeepSpeed config with the values that the data and the model's config tell."""
    cfg, model_config, total_steps = inputs.cfg, inputs.model_config, inputs.schedule.total_steps
    text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    return deepspeed_config(
        cfg,
        world_size=dist.world_size(),
        hidden_size=text_config.hidden_size,
        total_steps=total_steps,
        warmup_steps=warmup_steps(cfg.train, total_steps),
    )


def _optimizer(cfg: Config, model: Any, config: dict[str, Any], total_steps: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given to train with, where the DeepSpeed config has none of its own."""
    arguments: dict[str, Any] = {"model_parameters": [p for p in model.parameters() if p.requires_grad]}
    if "optimizer" not in config:
        arguments["optimizer"] = make_optimizer(model, cfg.train)
        if "scheduler" not in config:
            arguments["lr_scheduler"] = make_scheduler(arguments["optimizer"], cfg.train, total_steps)
    elif "scheduler" not in config:
        arguments["lr_scheduler"] = lambda optimizer: make_scheduler(optimizer, cfg.train, total_steps)
    return arguments


def _without_optimizer(config: dict[str, Any]) -> None:
    """DeepSpeed runs a model without an optimizer whole, or under ZeRO-3."""
    for key in ("optimizer", "scheduler"):
        config.pop(key, None)
    zero = config["zero_optimization"]
    zero.pop("offload_optimizer", None)
    if zero["stage"] < 3:
        config["zero_optimization"] = {"stage": 0}


def _mixer_eval_pool(cfg: Config, tokenizer: Any) -> Pool | None:
    names = cfg.flex.mixer_eval_dataset
    return load_pool(cfg, tokenizer, names, "mixer_eval_dataset") if names else None


def _collator(cfg: Config, tokenizer: Any) -> Collator:
    """Stage pt is packed when it is tokenised. FlashAttention tells packed samples apart in one row only."""
    rows = cfg.train.per_device_train_batch_size if cfg.model.flash_attn == "fa2" else 1
    return Collator(tokenizer.pad_token_id, packing=shares_rows(cfg), cutoff_len=rows * cfg.data.cutoff_len)


def _partition_while_loading(config: dict[str, Any]) -> Any:
    """transformers partitions a model under ZeRO-3 as it loads it while the returned object lives."""
    if zero_stage(config) != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)
