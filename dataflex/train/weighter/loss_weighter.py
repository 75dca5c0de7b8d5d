"""`loss`: weights from the losses of the global micro-batch (Sow et al., arXiv 2502.06733)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dataflex.core.registry import register_weighter
from dataflex.train.weighter.base_weighter import SampleWeighter, everywhere
from dataflex.utils.errors import UserError, nearest

STRATEGIES = ("linupper", "uniform", "quadratic", "extremes")


def loss_weights(losses: Tensor, *, strategy: str, delta: float, r: float) -> Tensor:
    """Weights [n] with mean 1 from the losses [n] of a global micro-batch.

    h scales the losses to [-delta, delta]; f = min(h + delta, delta) (linupper), 1 - h^2 / delta^2 (quadratic)
    or |h| (extremes); w = n softmax(f / r). ``uniform``, or losses that are all equal: exactly 1.
    """
    if strategy == "uniform":
        return torch.ones_like(losses)
    spread = losses.max() - losses.min()
    equal = spread <= 0  # asked on the device: the host does not wait for the losses
    spread = spread.where(~equal, 1.0)
    h = delta * (2.0 * (losses - losses.min()) / spread - 1.0)
    if strategy == "linupper":
        f = (h + delta).clamp(max=delta)
    elif strategy == "quadratic":
        f = 1.0 - (h / delta) ** 2
    else:
        f = h.abs()
    return torch.where(equal, 1.0, len(losses) * torch.softmax(f / r, dim=0))


def annealed(start: float, end: float, progress: float) -> float:
    """From ``start`` to ``end`` in equal steps of progress (0 to 1)."""
    return start + (end - start) * min(1.0, max(0.0, progress))


@register_weighter("loss")
class LossWeighter(SampleWeighter):
    """strategy: linupper, uniform, quadratic or extremes. delta: half the range of the scaled losses.

    r_start, r_end: the softmax temperature r falls from the one at the first weighted step to the other at the end
    of the run: weights are nearly equal at first, then sharper.
    """

    needs_logits = False

    def __init__(
        self,
        strategy: str = "linupper",
        delta: float = 1.0,
        r_start: float = 2.0,
        r_end: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if strategy not in STRATEGIES:
            raise UserError(
                f"loss weighter: strategy: '{strategy}'{nearest(strategy, STRATEGIES)}; valid: {', '.join(STRATEGIES)}"
            )
        for key, value in (("delta", delta), ("r_start", r_start), ("r_end", r_end)):
            if not value > 0:
                raise UserError(f"loss weighter: {key}: must be > 0, got {value}")
        self.relative = strategy != "uniform"
        self.strategy, self.delta, self.r_start, self.r_end = strategy, delta, r_start, r_end

    def sample_weights(self, losses: Tensor, *, ctx: Any, model: Any, inputs: Any) -> Tensor:
        progress = (ctx.step - self.warmup_step) / max(1, ctx.total_steps - self.warmup_step)
        r = annealed(self.r_start, self.r_end, progress)
        whole, mine = everywhere(losses, ctx)
        return loss_weights(whole, strategy=self.strategy, delta=self.delta, r=r)[mine]
