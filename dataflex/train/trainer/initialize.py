"""`initialize`: a DeepSpeed engine with the components that a config names tied to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dataflex.config import load_config
from dataflex.core.hook import Hook
from dataflex.data.collate import Collator
from dataflex.data.pool import Pool
from dataflex.engine.plugin import DataflexEngine
from dataflex.train.trainer.build import attach
from dataflex.train.trainer.components import load_components
from dataflex.utils.errors import UserError


def initialize(
    *,
    model: torch.nn.Module,
    config: Any,
    train_dataset: Any,
    dataflex: str | Path | Mapping[str, Any] | None = None,
    eval_dataset: Any = None,
    mixer_eval_dataset: Any = None,
    data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
    tokenizer: Any = None,
    model_parameters: Any = None,
    hooks: Sequence[Hook] = (),
    **deepspeed_arguments: Any,
) -> DataflexEngine:
    """Call `deepspeed.initialize` and tie selection, mixing and weighting to the engine.

    model, config, model_parameters and ``deepspeed_arguments`` (optimizer, lr_scheduler, ...): as
    `deepspeed.initialize` takes them. dataflex: a YAML file or a mapping with the keys of the schedule
    (train_type, component_name, update_step, ...), ``seed``, ``num_train_epochs`` and ``output_dir``.
    train_dataset, eval_dataset, mixer_eval_dataset: map-style datasets of dicts with ``input_ids`` and ``labels``, or
    {domain name: dataset}. data_collator: list of samples to a batch of tensors, one row per sample; default:
    right padding with the tokenizer's pad token. hooks: further hooks, called after dataflex's own.

    The whole model is put in train mode here and at each step, as transformers' Trainer does: a module that shall stay
    in eval mode overrides its ``train``.
    """
    import deepspeed

    cfg = load_config(dataflex if dataflex is not None else {}, embedded=True)
    load_components(cfg.flex.component_modules)
    pool = Pool.from_datasets(train_dataset)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        config=config,
        model_parameters=trained if model_parameters is None else model_parameters,
        **deepspeed_arguments,
    )
    return attach(
        engine,
        cfg=cfg,
        pool=pool,
        eval_pool=None if eval_dataset is None else Pool.from_datasets(eval_dataset),
        mixer_eval_pool=None if mixer_eval_dataset is None else Pool.from_datasets(mixer_eval_dataset),
        collator=data_collator or Collator(_pad_token(tokenizer)),
        tokenizer=tokenizer,
        hooks=hooks,
    )


def _pad_token(tokenizer: Any) -> int:
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        raise UserError("initialize: pass data_collator, or a tokenizer with a pad token")
    return int(pad)
