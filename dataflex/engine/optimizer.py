"""The optimizer and the learning rate schedule of a YAML run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dataflex.utils.errors import UserError, nearest

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
    """Steps in which the learning rate rises: ``warmup_steps``, else ``warmup_ratio``; a share is rounded up."""
    if train.warmup_steps >= 1:
        return int(train.warmup_steps)
    return math.ceil(total_steps * (train.warmup_steps or train.warmup_ratio))


def make_scheduler(optimizer: torch.optim.Optimizer, train: TrainSection, total_steps: int) -> Any:
    """The named schedule of transformers over ``total_steps`` optimizer steps, with options that it takes.

    Of the steps after the warm-up of ``warmup_stable_decay`` a third is stable and the rest decays, where its options
    say nothing else of either, as in LLaMA-Factory.
    """
    from transformers import get_scheduler, get_wsd_schedule

    name, warmup, options = train.lr_scheduler_type, warmup_steps(train, total_steps), train.lr_scheduler_kwargs or {}
    if name == "warmup_stable_decay":
        stable = (total_steps - warmup) // 3
        lengths: dict[str, Any] = {"num_stable_steps": stable, "num_decay_steps": total_steps - warmup - stable}
        return get_wsd_schedule(optimizer, warmup, **lengths | options)
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=dict(options),
    )
