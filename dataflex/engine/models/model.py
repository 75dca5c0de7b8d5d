"""Tokenizer and model of a YAML run: loaded or from scratch, with LoRA, full or freeze finetuning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dataflex.engine.models.lora import with_lora
from dataflex.utils.errors import UserError, brief, nearest
from dataflex.utils.logging import logger

if TYPE_CHECKING:
    from dataflex.config import Config
    from dataflex.config.schema import MethodSection

_ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}


def hub_options(cfg: Config) -> dict[str, Any]:
    """What transformers is told besides the name of what it loads."""
    model = cfg.model
    return {
        "trust_remote_code": model.trust_remote_code,
        "revision": model.model_revision,
        "cache_dir": model.cache_dir,
    }


def load_tokenizer(cfg: Config) -> Any:
    """The tokenizer to train with: padding on the right, with a pad token and the new special tokens."""
    tokenizer = read_tokenizer(cfg)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            source = cfg.model.model_name_or_path
            raise UserError(f"model_name_or_path: the tokenizer at '{source}' has neither a pad nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
    add_new_tokens(tokenizer, cfg)
    return tokenizer


def read_tokenizer(cfg: Config, folder: str | None = None) -> Any:
    """The model's tokenizer as it is, or that in ``folder``."""
    from transformers import AutoTokenizer

    source = folder or cfg.model.model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(source, **hub_options(cfg))
    except Exception as exc:  # damaged files, missing packages: transformers has many words for them
        raise UserError(f"model_name_or_path: no tokenizer at '{source}'{_no_folder(source)}: {brief(exc)}") from exc


def add_new_tokens(tokenizer: Any, cfg: Config) -> None:
    """Add new_special_tokens to those that the tokenizer has; what it knows already keeps its id."""
    if cfg.model.new_special_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": list(cfg.model.new_special_tokens)}, False)


def load_model_config(cfg: Config) -> Any:
    """The model's transformers config."""
    from transformers import AutoConfig

    source = cfg.model.model_name_or_path
    try:
        return AutoConfig.from_pretrained(source, **hub_options(cfg))
    except Exception as exc:
        raise UserError(f"model_name_or_path: no model config at '{source}': {brief(exc)}") from exc


def load_model(cfg: Config, model_config: Any, tokenizer: Any) -> nn.Module:
    """The model to train, with the trained parameters marked and activation checkpointing set."""
    from transformers import AutoModelForCausalLM

    if cfg.train.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.train.tf32
    dtype = torch.bfloat16 if cfg.train.bf16 else torch.float16 if cfg.train.fp16 else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": cfg.model.trust_remote_code}
    if cfg.model.flash_attn != "auto":
        options["attn_implementation"] = _ATTENTION[cfg.model.flash_attn]
    if cfg.model.train_from_scratch:
        model = AutoModelForCausalLM.from_config(model_config, **options)
    else:
        source = cfg.model.model_name_or_path
        try:
            model = AutoModelForCausalLM.from_pretrained(source, config=model_config, **options | hub_options(cfg))
        except torch.OutOfMemoryError:
            raise
        except Exception as exc:
            raise UserError(
                f"model_name_or_path: no fitting weights at '{source}': {brief(exc)} "
                "(train_from_scratch: true starts from random ones)"
            ) from exc
    grow(model, len(tokenizer))
    model = _finetuned(model, cfg)
    if cfg.train.neftune_noise_alpha is not None:
        _add_noise(model, cfg.train.neftune_noise_alpha)
    if cfg.flex.freeze_gate:
        freeze_routers(model)
    if cfg.method.checkpoint_activations:
        _checkpoint_activations(model, cfg.method.use_reentrant_gc)
    _say_trainable(model)
    return model


def grow(model: Any, tokens: int) -> None:
    """Add rows to the embeddings where the tokenizer has more tokens; quietly, since it is what was asked for."""
    from transformers.utils import logging

    if tokens > model.get_input_embeddings().num_embeddings:
        level = logging.get_verbosity()
        logging.set_verbosity_error()
        model.resize_token_embeddings(tokens)
        logging.set_verbosity(level)


def _finetuned(model: Any, cfg: Config) -> Any:
    method = cfg.method
    if method.finetuning_type == "lora":
        return with_lora(model, cfg)
    if cfg.model.adapter_name_or_path is not None:
        raise UserError("adapter_name_or_path: needs finetuning_type: lora")
    if method.finetuning_type == "freeze":
        _freeze(model, method)
    return model


def _checkpoint_activations(model: Any, reentrant: bool) -> None:
    """Recompute activations in the backward; transformers before 5.2x has the older name only.

    A model that cannot is trained without.
    """
    if not getattr(model, "supports_gradient_checkpointing", True):
        name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
        logger.warning(f"gradient_checkpointing: {name} does not support it; its activations are kept")
        return
    model.enable_input_require_grads()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def _add_noise(model: Any, alpha: float) -> None:
    """NEFTune (arXiv 2310.05914): uniform noise of alpha / sqrt(tokens x hidden size) on the embeddings.

    Only in train mode, so that neither scores nor evaluations see it.
    """
    from transformers.integrations.neftune import neftune_post_forward_hook

    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = alpha
    embeddings.register_forward_hook(neftune_post_forward_hook)


def _freeze(model: nn.Module, method: MethodSection) -> None:
    """Train ``freeze_trainable_layers`` hidden layers (last if positive, first if negative).

    Of what is outside the layers only ``freeze_extra_modules``.
    """
    numbers = {int(m.group(1)) for name, _ in model.named_parameters() if (m := _layer_of(name))}
    count, asked = len(numbers), method.freeze_trainable_layers
    if asked == 0 or abs(asked) > count:
        raise UserError(f"freeze_trainable_layers: the model has {count} layers; got {asked}")
    chosen = set(range(count - asked, count)) if asked > 0 else set(range(-asked))
    names = method.freeze_trainable_modules
    if names != ("all",):
        parts = {part for name, _ in model.named_parameters() if _layer_of(name) for part in name.split(".")}
        for name in names:
            if name not in parts:
                raise UserError(f"freeze_trainable_modules: no '{name}' in the layers{nearest(name, parts)}")
    extra = set(method.freeze_extra_modules)
    outside = {name.split(".")[-2] for name, _ in model.named_parameters() if not _layer_of(name)}
    for name in sorted(extra - outside):
        there = ", ".join(sorted(outside))
        raise UserError(
            f"freeze_extra_modules: no '{name}' outside the layers{nearest(name, outside)}; there are {there}"
        )
    for name, parameter in model.named_parameters():
        layer, parts = _layer_of(name), set(name.split("."))
        named = names == ("all",) or bool(set(names) & parts)
        inside = layer is not None and int(layer.group(1)) in chosen and named
        parameter.requires_grad_(inside or (layer is None and bool(extra & parts)))


def freeze_routers(model: nn.Module) -> None:
    """Train no router of a mixture of experts: modules called ``gate`` or ``router``, not ``gate_proj``.

    UserError for a model without one.
    """
    routers = [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in ("gate", "router")]
    if not routers:
        raise UserError("freeze_gate: the model has no router (a module called gate or router); drop the key")
    for router in routers:
        router.requires_grad_(False)


def _layer_of(name: str) -> re.Match[str] | None:
    return re.search(r"\.(\d+)\.", name)


def _say_trainable(model: nn.Module) -> None:
    def size(p: nn.Parameter) -> int:
        return int(getattr(p, "ds_numel", p.numel()))

    trained = sum(size(p) for p in model.parameters() if p.requires_grad)
    every = sum(size(p) for p in model.parameters())
    logger.info(f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100 * trained / every:.4f}")


def _no_folder(source: str) -> str:
    return "" if Path(source).exists() else " (there is no such folder, so it was looked up as a Hub name)"
