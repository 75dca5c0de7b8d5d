"""The optimizer and the learning rate schedule of a YAML run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from dataflex.config.schema import TrainSection


def make_optimizer(model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
    """AdamW or SGD over the trained parameters; biases and norm weights are not decayed."""
    spared = {
        id(p)
        for m in model.modules()
        for name, p in m.named_parameters(recurse=False)
        if name == "bias" or "norm" in type(m).__name__.lower()
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in spared], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if id(p) in spared], "weight_decay": 0.0},
    ]
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


def make_scheduler(optimizer: torch.optim.Optimizer, train: TrainSection, total_steps: int) -> Any:
    """The named schedule of transformers over ``total_steps`` optimizer steps."""
    from transformers import get_scheduler

    return get_scheduler(
        train.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_steps(train, total_steps),
        num_training_steps=total_steps,
    )
