"""A model with its LoRA adapter merged into it, as a Hugging Face folder; without DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dataflex.engine.models.export import size_of, write_weights
from dataflex.engine.models.handover import Handover, handover
from dataflex.engine.models.lora import with_adapter
from dataflex.engine.models.model import grow, hub_options, load_model_config
from dataflex.utils.errors import UserError, brief
from dataflex.utils.room import check_room, said_when_full

if TYPE_CHECKING:
    from dataflex.config import Config


def merge(cfg: Config, folder: Path) -> tuple[str, Handover]:
    """Write the model of ``cfg``, its adapter merged, to ``folder``; the dtype and what was handed over with it.

    Tokenizer and chat template are the adapter's own where its folder has them, as a run writes them. On the CPU.
    """
    model_config, adapter = load_model_config(cfg), cfg.model.adapter_name_or_path
    given = handover(cfg, model_config, None if adapter is None else Path(adapter))
    model = _load(cfg, model_config)
    grow(model, len(given.tokenizer))
    if adapter is not None:
        model = with_adapter(model, adapter, trains=False).merge_and_unload()
    if cfg.export.infer_dtype != "auto":
        model = model.to(getattr(torch, cfg.export.infer_dtype))
    model.config.dtype = model.dtype
    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder, sum(map(size_of, model.parameters())), "the merged model")
    with said_when_full(folder, "the merged model"):
        write_weights(model, folder, given, max_shard_size=round(cfg.export.export_size * 1e9))
        given.tokenizer.save_pretrained(folder)
    return str(model.dtype).removeprefix("torch."), given


def _load(cfg: Config, model_config: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = cfg.model.model_name_or_path
    try:
        return AutoModelForCausalLM.from_pretrained(source, config=model_config, dtype="auto", **hub_options(cfg))
    except Exception as exc:  # damaged files, missing packages: transformers has many words for them
        raise UserError(f"model_name_or_path: no fitting weights at '{source}': {brief(exc)}") from exc
