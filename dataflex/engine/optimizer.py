"""The optimizer and the learning rate schedule of a YAML run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dataflex.utils.errors import UserError, brief, nearest

if TYPE_CHECKING:
    from dataflex.config.sections.train import TrainSection


def make_optimizer(model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
    """AdamW or SGD over the trained parameters; biases and norm weights are not decayed.

    Each product of ``layer_lr_multipliers`` and ``loraplus_lr_ratio`` (LoRA+, arXiv 2402.12354: of all B) is a
    parameter group with its own learning rate; 1 comes first.
    """
    spared = {
        id(p)
        for m in model.modules()
        for name, p in m.named_parameters(recurse=False)
        if name == "bias" or "norm" in type(m).__name__.lower()
    }
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    factors = lr_multipliers(list(trained), train.layer_lr_multipliers or {})
    for name in factors:
        if ".lora_B." in name:
            factors[name] *= train.loraplus_lr_ratio or 1.0
    groups = []
    for factor in sorted(set(factors.values()), key=lambda f: (f != 1.0, f)):
        mine = [p for name, p in trained.items() if factors[name] == factor]
        rate = train.learning_rate * factor
        decayed, others = [p for p in mine if id(p) not in spared], [p for p in mine if id(p) in spared]
        groups.append({"params": decayed, "weight_decay": train.weight_decay, "lr": rate})
        groups.append({"params": others, "weight_decay": 0.0, "lr": rate})
    groups = [group for group in groups if group["params"]]
    if train.optim == "sgd":
        return torch.optim.SGD(groups, lr=train.learning_rate)
    return torch.optim.AdamW(
        groups,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=True if train.optim == "adamw_torch_fused" else None,
    )


def lr_multipliers(names: Sequence[str], patterns: Mapping[str, float]) -> dict[str, float]:
    """The factor of each parameter's learning rate: the product of those of the patterns that match its name.

    A pattern is whole dotted parts of a name, anywhere in it; ``*`` is any text within a part: ``layers.1`` is not
    ``layers.10``. UserError for a pattern that matches no trained parameter.
    """
    factors = dict.fromkeys(names, 1.0)
    for pattern, factor in patterns.items():
        wanted = re.escape(pattern).replace(r"\*", r"[^.]*")
        found = [name for name in names if re.search(rf"(^|\.){wanted}(\.|$)", name)]
        if not found:
            parts = {
                ".".join(p[i:j]) for p in (n.split(".") for n in names) for i in range(len(p)) for j in (i + 1, i + 2)
            }
            hint = nearest(pattern, sorted(parts))
            raise UserError(f"layer_lr_multipliers: '{pattern}' matches no trained parameter{hint}; one is {names[0]}")
        for name in found:
            factors[name] *= factor
    return factors


def forget_dry_step(engine: Any) -> None:
    """Start Adam's count at 0 without ZeRO in bf16 or fp16.

    DeepSpeed's optimizer there takes a step with zero gradients when it is made, so that the first true update
    would be 0.74 of what it is at the other stages.
    """
    if type(engine.optimizer).__name__ == "FP16_UnfusedOptimizer":
        engine.optimizer.state.clear()


def warmup_steps(train: TrainSection, total_steps: int) -> int:
    """Steps in which the learning rate rises: ``warmup_steps``, else ``warmup_ratio`` of all, rounded up."""
    return train.warmup_steps or int(-(-total_steps * train.warmup_ratio // 1))


def check_schedule(train: TrainSection, total_steps: int) -> None:
    """UserError where `make_scheduler` would raise one, before there is a model."""
    nothing = torch.nn.Parameter(torch.zeros(1))
    make_scheduler(torch.optim.SGD([nothing], lr=train.learning_rate), train, total_steps)


def make_scheduler(optimizer: torch.optim.Optimizer, train: TrainSection, total_steps: int) -> Any:
    """The named schedule of transformers over ``total_steps`` optimizer steps.

    UserError for options that it does not take. Of the steps after the warm-up of ``warmup_stable_decay``, a third is
    stable where its options do not say it, as in LLaMA-Factory.
    """
    from transformers import get_scheduler

    name, warmup = train.lr_scheduler_type, warmup_steps(train, total_steps)
    options = dict(train.lr_scheduler_kwargs or {})
    try:
        if name == "warmup_stable_decay":
            after = total_steps - warmup
            options.setdefault("num_decay_steps", after - options.get("num_stable_steps", after // 3))
        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=options,
        )
    except (TypeError, ValueError) as exc:
        raise UserError(f"lr_scheduler_kwargs: {name} does not take {options}: {brief(exc)}") from exc
