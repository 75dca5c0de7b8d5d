"""LoRA on a transformers model: which layers are adapted, and which cannot be."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dataflex.engine.models.adapter import read_adapter_config
from dataflex.engine.models.unpartitioned import without_values
from dataflex.forward.head import is_plain_linear
from dataflex.scoring.gradients.coverage import kind_of, reads_parameter
from dataflex.utils.errors import UserError, brief, nearest
from dataflex.utils.logging import logger

if TYPE_CHECKING:
    from dataflex.config import Config


def with_lora(model: Any, cfg: Config) -> Any:
    """The model with new adapters as the config has them, or with those of ``adapter_name_or_path``.

    ``lora_target: all`` is every linear layer but the output layer; one line says what of it cannot be adapted.
    UserError for a target that is not there or that an adapter cannot be put on.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    if cfg.model.adapter_name_or_path is not None:
        return with_adapter(model, cfg.model.adapter_name_or_path)
    method = cfg.method
    every = method.lora_target == ("all",)
    unfit = unfit_linears(model)
    check_named(model, cfg, unfit)
    config = LoraConfig(
        r=method.lora_rank,
        lora_alpha=method.lora_scale_alpha,
        lora_dropout=method.lora_dropout,
        use_rslora=method.use_rslora,
        target_modules="all-linear" if every else list(method.lora_target),
        exclude_modules=list(unfit) if every and unfit else None,
        modules_to_save=_trained_whole(model, cfg) or None,
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        with _without_peft_notices():
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as exc:
        raise UserError(f"lora_target: {', '.join(method.lora_target)}: {brief(exc)}") from exc
    if every:
        _say_left_out(adapted, unfit)
    return adapted


def check_named(model: nn.Module, cfg: Config, unfit: dict[str, str]) -> None:
    """UserError for a lora_target or an additional_target that the model does not have. unfit: of `unfit_linears`."""
    method = cfg.method
    if method.lora_target != ("all",):
        _check_targets(method.lora_target, model, unfit)
    _check_names("additional_target", method.additional_target, {name for name, _ in model.named_modules() if name})


def check_ahead(cfg: Config, model_config: Any) -> None:
    """`check_named` without the model's weights, before anything that takes long; nothing where no module is named."""
    from transformers import AutoModelForCausalLM

    method = cfg.method
    named = method.lora_target != ("all",) or method.additional_target
    if method.finetuning_type != "lora" or cfg.model.adapter_name_or_path is not None or not named:
        return
    with without_values():
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=cfg.model.trust_remote_code)
    check_named(model, cfg, unfit_linears(model))


def unfit_linears(model: nn.Module) -> dict[str, str]:
    """{full name: why} of the linear layers that an adapter would break or not reach.

    An adapter stands around the layer's forward. A subclass with a forward of its own need not return x W^T (routers
    return tuples); and where the module around it reads the weight by itself, as the fused kernels of state-space
    models do, the layer's forward is not called.
    """
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not is_plain_linear(module):
            found[path] = f"a {type(module).__name__}, with a forward of its own"
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and reads_parameter(type(module), name):
                found[f"{path}.{name}".lstrip(".")] = f"{type(module).__name__} reads its weight by itself"
    return found


def _say_left_out(adapted: nn.Module, unfit: dict[str, str]) -> None:
    """One line with the layers that ``all`` has not adapted, those of all blocks as one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside = {id(m) for tuner in adapted.modules() if isinstance(tuner, BaseTunerLayer) for m in tuner.modules()}
    head = adapted.get_output_embeddings()  # type: ignore[operator]
    reasons: dict[str, str] = {}
    for path, module in adapted.named_modules():
        name = path.removeprefix("base_model.model.")
        fused = kind_of(module) == "experts"
        if id(module) not in inside and module is not head and (fused or isinstance(module, nn.Linear)):
            why = unfit.get(name, "fused experts, no linear layers" if fused else "peft passes it over")
            reasons[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)] = why
    if reasons:
        logger.info(f"lora_target: all leaves out {', '.join(f'{name} ({why})' for name, why in reasons.items())}")


def _check_targets(targets: tuple[str, ...], model: nn.Module, unfit: dict[str, str]) -> None:
    """UserError for a target that matches no linear layer, or one that is unfit."""
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) or is_plain_linear(m)}
    _check_names("lora_target", targets, linear)
    for target in targets:
        for name, why in unfit.items():
            if f".{name}".endswith(f".{target}"):
                raise UserError(f"lora_target: '{target}': {name} ({why}) cannot have an adapter")


def with_adapter(model: Any, source: str, trains: bool = True) -> Any:
    """The model with an existing adapter, to go on training it or to be used."""
    from peft import PeftModel, PeftType

    kind = read_adapter_config(source).peft_type
    if kind != PeftType.LORA:
        raise UserError(f"adapter_name_or_path: '{source}' is an adapter of type {kind.value}; valid: LORA")
    try:
        with _without_peft_notices():
            return PeftModel.from_pretrained(model, source, is_trainable=trains)
    except torch.OutOfMemoryError:
        raise
    except Exception as exc:
        raise UserError(f"adapter_name_or_path: no fitting adapter at '{source}': {brief(exc)}") from exc


def _trained_whole(model: Any, cfg: Config) -> list[str]:
    """additional_target, and the embeddings where there are new tokens, which an adapter could not learn.

    With resize_vocab and no additional_target too, as in LLaMA-Factory.
    """
    names = list(cfg.method.additional_target)
    grown = cfg.model.resize_vocab and not names
    if cfg.model.new_special_tokens or grown:
        both = (model.get_input_embeddings(), model.get_output_embeddings())
        found = [name.rsplit(".", 1)[-1] for name, m in model.named_modules() if any(m is e for e in both)]
        key = "new_special_tokens" if cfg.model.new_special_tokens else "resize_vocab"
        logger.info(f"{key}: {' and '.join(found)} are trained whole")
        names += [name for name in found if name not in names]
    return names


@contextmanager
def _without_peft_notices() -> Iterator[None]:
    """peft asks the model a question that transformers is about to rename, and warns about tied embeddings.

    Those trained whole are saved whole, so an adapter of a model with tied embeddings loads as it was trained. It
    also says that it puts right the one option that GPT-2's Conv1D needs.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
        yield


def _check_names(key: str, names: tuple[str, ...], modules: Iterable[str]) -> None:
    known = {name.rsplit(".", 1)[-1] for name in modules if not name.rsplit(".", 1)[-1].isdigit()}
    for name in names:
        if name.rsplit(".", 1)[-1] not in known:
            raise UserError(
                f"{key}: the model has no '{name}'{nearest(name, known)}; it has {', '.join(sorted(known))}"
            )
