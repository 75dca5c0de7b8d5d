"""`custom`: the smallest weighter there is, to copy from."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dataflex.core.registry import register_weighter
from dataflex.train.weighter.base_weighter import Weighter
from dataflex.utils.errors import UserError


@register_weighter("custom")
class CustomWeighter(Weighter):
    """Every sample counts the same. strategy: ``uniform``."""

    needs_logits = False

    def __init__(self, strategy: str = "uniform", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if strategy != "uniform":
            raise UserError(f"custom weighter: strategy: '{strategy}'; valid: uniform")

    def get_weighted_loss(
        self, losses: Tensor, *, ctx: Any = None, model: nn.Module | None = None, inputs: Any = None
    ) -> Tensor:
        return losses.mean()
