"""A user's weighter as the seeds' guide has it: for the package's folder, or named in component_modules."""

from typing import Any, Union

import torch
from torch import nn

from dataflex.core.registry import register_weighter
from dataflex.utils.logging import logger

from .base_weighter import Weighter


@register_weighter("own_weight")
class OwnWeighter(Weighter):
    def __init__(self, strategy: str = "uniform", **kwargs):
        super().__init__(**kwargs)
        self.strategy = strategy
        logger.info(f"OwnWeighter initialized with strategy: {strategy}")

    def get_weighted_loss(
        self,
        losses: torch.Tensor,
        *,
        ctx: Any = None,
        model: nn.Module | None = None,
        inputs: dict[str, Union[torch.Tensor, Any]] | None = None,  # noqa: UP007
    ) -> torch.Tensor:
        if not torch.is_tensor(losses) or losses.dim() == 0:
            return losses
        assert ctx.state.global_step >= 0 and inputs["labels"].shape[0] == len(losses)
        weights = torch.ones_like(losses) / losses.numel()
        return torch.sum(weights * losses)
