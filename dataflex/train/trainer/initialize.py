"""`initialize`: a DeepSpeed engine with the components that a config names tied to it."""

from __future__ import annotations

import argparse
import base64
import binascii
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dataflex.config import Config, deepspeed_json, load_config
from dataflex.config.rules.packing import shares_rows
from dataflex.core.hook import Hook
from dataflex.data.encoding.collate import Collator
from dataflex.data.pool import Pool
from dataflex.engine.ds_config import given_config
from dataflex.engine.plugin import DataflexEngine
from dataflex.train.trainer.build import attach, packing_of
from dataflex.train.trainer.components import load_components
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger


def initialize(
    *,
    train_dataset: Any,
    model: torch.nn.Module | None = None,
    config: Any = None,
    engine: Any = None,
    dataflex: str | Path | Mapping[str, Any] | None = None,
    eval_dataset: Any = None,
    mixer_eval_dataset: Any = None,
    data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
    tokenizer: Any = None,
    model_parameters: Any = None,
    hooks: Sequence[Hook] = (),
    **deepspeed_arguments: Any,
) -> DataflexEngine:
    """Call `deepspeed.initialize`, or take an ``engine`` that it made, and tie selection, mixing and weighting to it.

    model, config, model_parameters and ``deepspeed_arguments`` (args, optimizer, lr_scheduler, ...): as
    `deepspeed.initialize` takes them; none of them with ``engine``. dataflex: a YAML file or a mapping with the keys of
    the schedule (train_type, component_name, update_step, ...), ``seed``, ``num_train_epochs`` and ``output_dir``;
    without it, the block ``"dataflex"`` of the DeepSpeed config. train_dataset, eval_dataset, mixer_eval_dataset:
    map-style datasets of dicts with ``input_ids`` and ``labels``, or {domain name: dataset}. data_collator: list of
    samples to a batch of tensors, one row per sample or ``cu_seqlens``; default: right padding with the tokenizer's pad
    token, or with ``packing`` packs of ``cutoff_len``. hooks: further hooks, called after dataflex's own.

    The whole model is put in train mode here and at each step, as transformers' Trainer does: a module that shall stay
    in eval mode overrides its ``train``. ``model.config.use_cache`` is False from here on: set it before generation.
    """
    pool, eval_pool = Pool.from_datasets(train_dataset), _pool(eval_dataset, "eval_dataset")
    if engine is not None:
        given = {"model": model, "config": config, "model_parameters": model_parameters, **deepspeed_arguments}
        _check_engine(engine, [name for name, value in given.items() if value is not None])
        cfg = _settings(given_config(engine), "the engine's DeepSpeed config", dataflex, None)[0]
    else:
        _check_model_argument(model)
        config, where, deepspeed_arguments = _deepspeed_config(config, deepspeed_arguments)
        folder = Path(where).parent if os.path.isfile(where) else None
        cfg, config = _settings(config, where, dataflex, folder)
    load_components(cfg.flex.component_modules)
    _make_folder(cfg.output.output_dir)
    return attach(
        packing=packing_of(cfg, pool),
        engine=engine if engine is not None else _make_engine(model, config, model_parameters, deepspeed_arguments),
        cfg=cfg,
        pool=pool,
        eval_pool=eval_pool,
        mixer_eval_pool=_pool(mixer_eval_dataset, "mixer_eval_dataset"),
        collator=data_collator or Collator(_pad_token(tokenizer), shares_rows(cfg), cfg.data.cutoff_len),
        tokenizer=tokenizer,
        hooks=hooks,
    )


def _pool(datasets: Any, key: str) -> Pool | None:
    return None if datasets is None else Pool.from_datasets(datasets, key)


def _make_engine(model: Any, config: dict[str, Any], model_parameters: Any, arguments: dict[str, Any]) -> Any:
    import deepspeed

    trained = [p for p in model.parameters() if p.requires_grad]
    parameters = trained if model_parameters is None else model_parameters
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=parameters, **arguments)
    return engine


def _check_model_argument(model: Any) -> None:
    import deepspeed

    if model is None:
        raise UserError("initialize: pass model and config, or an engine that deepspeed.initialize made")
    if isinstance(model, DataflexEngine):
        raise UserError("model: is an engine of dataflex.initialize already; pass the plain model")
    if isinstance(model, deepspeed.DeepSpeedEngine):
        raise UserError("model: is a DeepSpeed engine already; pass it as engine=, without model and config")


def _check_engine(engine: Any, given: list[str]) -> None:
    """UserError unless it is a DeepSpeed engine that can be trained by a plan from here on."""
    import deepspeed

    if given:
        raise UserError(f"engine: is made already, so {', '.join(given)} would not be used; drop them")
    if isinstance(engine, DataflexEngine):
        raise UserError("engine: is wrapped by dataflex already; pass what deepspeed.initialize returned")
    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        raise UserError(
            f"engine: expected the first of what deepspeed.initialize returns, got a {type(engine).__name__}"
        )
    if isinstance(engine, deepspeed.PipelineEngine):
        raise UserError("engine: a pipeline engine splits layers over ranks, so per-sample gradients are incomplete")
    if engine.optimizer is None or not hasattr(engine.optimizer, "param_groups"):
        raise UserError("engine: has no optimizer, so it cannot train")
    if engine.micro_steps % engine.gradient_accumulation_steps():
        raise UserError("engine: is in the middle of a step; wrap it after engine.step() of its last micro-batch")
    if engine.global_steps:
        logger.info(
            f"engine: has done {engine.global_steps:,} steps; weights, optimizer and learning rate schedule go on from "
            "there, dataflex's own schedule starts at its step 0"
        )


def _deepspeed_config(config: Any, arguments: dict[str, Any]) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """(the DeepSpeed config, where it is from, the arguments without it), from wherever DeepSpeed takes it."""
    arguments = dict(arguments)
    given = {"config": config, "config_params": arguments.pop("config_params", None)}
    args: Any = arguments.get("args")
    if getattr(args, "deepspeed_config", None) is not None:
        given["args.deepspeed_config"] = args.deepspeed_config
        arguments["args"] = argparse.Namespace(**{**vars(args), "deepspeed_config": None})
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        raise UserError(f"config: the DeepSpeed config is needed once, got {', '.join(named) or 'none'}")
    ((name, value),) = named.items()
    return _read(value, name), name if isinstance(value, Mapping) else str(value), arguments


def _read(value: Any, name: str) -> dict[str, Any]:
    """A DeepSpeed config as DeepSpeed reads it: a mapping, a file of JSON with comments, or base64 of one."""
    import hjson
    from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

    if isinstance(value, Mapping):
        return dict(value)
    try:
        is_file = os.path.exists(value)  # Path.exists raises where the text is longer than a file name may be
        text = Path(value).read_text("utf-8") if is_file else base64.urlsafe_b64decode(str(value)).decode()
    except (OSError, TypeError, UnicodeDecodeError, binascii.Error) as exc:
        raise UserError(f"{name}: there is no DeepSpeed config '{value}'") from exc
    try:
        read = hjson.loads(text, object_pairs_hook=dict_raise_error_on_duplicate_keys)
    except ValueError as exc:
        raise UserError(f"{value}: not valid JSON: {' '.join(str(exc).split())}") from exc
    if not isinstance(read, Mapping):
        raise UserError(f"{value}: expected a JSON object")
    return dict(read)


def _settings(
    config: dict[str, Any], where: str, dataflex: str | Path | Mapping[str, Any] | None, folder: Path | None
) -> tuple[Config, dict[str, Any]]:
    """(dataflex's config, the DeepSpeed config without its block); UserError for what cannot be scored exactly."""
    block = config.get(deepspeed_json.BLOCK)
    rest = {key: value for key, value in config.items() if key != deepspeed_json.BLOCK}
    for text in deepspeed_json.refusals(rest):
        raise UserError(f"{where}: {text}")
    for key in _autos(rest):
        raise UserError(f'{where}: "auto" of {key} is filled in by the YAML of dataflex-cli only; write a value')
    if block is None:
        return load_config(dataflex if dataflex is not None else {}, embedded=True), rest
    place = f"{where}:{deepspeed_json.BLOCK}"
    if dataflex is not None:
        raise UserError(f"{place}: dataflex is configured twice, there and by dataflex=; keep one")
    if not isinstance(block, Mapping):
        raise UserError(f"{place}: expected a block of keys, got {block!r}")
    return load_config(block, embedded=True, name=place, folder=folder), rest


def _autos(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _autos(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(f"{prefix}{key}")
    return found


def _make_folder(output_dir: str) -> None:
    """What is decided and weighed is written there, if it is named; a collective."""
    folder = Path(output_dir)

    def make() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise UserError(f"output_dir: cannot write to '{folder}': {exc.strerror or exc}") from exc

    if output_dir:
        dist.together(make)


def _pad_token(tokenizer: Any) -> int:
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        raise UserError("initialize: pass data_collator, or a tokenizer with a pad token")
    return int(pad)
