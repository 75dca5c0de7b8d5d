"""The hook that asks a weighter: unweighted in the warm-up, then at every micro-batch."""

from __future__ import annotations

from typing import Any

import torch

from dataflex.core.context import Run
from dataflex.core.hook import Weigher
from dataflex.ops import SampleLoss
from dataflex.train.weighter.base_weighter import SampleWeighter, Weighter
from dataflex.utils.errors import UserError


class WeightHook(Weigher):
    """Asks ``weighter`` from step ``warmup_step`` on."""

    def __init__(self, weighter: Weighter, name: str, warmup_step: int) -> None:
        self.weighter = weighter
        self.name = name
        self.warmup_step = warmup_step

    def on_train_start(self, run: Run) -> None:
        """UserError where the samples' own weights would be lost in a weighter's one loss."""
        if not isinstance(self.weighter, SampleWeighter) and "sample_weight" in run.pool[0]:
            raise UserError(
                f"weighter '{self.name}': returns one loss for the batch, so the samples' own sample_weight would be "
                "lost; derive it from SampleWeighter, or drop sample_weight"
            )

    def weigh(self, run: Run, micro: Any, losses: SampleLoss, outputs: Any) -> torch.Tensor | None:
        if run.step < self.warmup_step:
            return None
        per_sample = losses.loss
        inputs = {**micro.inputs, "labels": micro.raw_labels}
        if isinstance(self.weighter, SampleWeighter):
            weights = self.weighter.sample_weights(per_sample.detach(), ctx=run, model=run.engine.module, inputs=inputs)
            return self._checked(run, weights, per_sample.shape)
        loss = self.weighter.get_weighted_loss(per_sample, ctx=run, model=run.engine.module, inputs=inputs)
        loss = self._checked(run, loss, torch.Size())
        if not loss.requires_grad:
            raise UserError(
                f"weighter '{self.name}' at step {run.step}: expected a scalar loss with gradient, got one without"
            )
        return loss

    def _checked(self, run: Run, answer: Any, shape: torch.Size) -> torch.Tensor:
        """UserError unless the answer is a tensor of ``shape``."""
        if not torch.is_tensor(answer) or answer.shape != shape:
            got = tuple(answer.shape) if torch.is_tensor(answer) else type(answer).__name__
            what = "a scalar loss" if shape == torch.Size() else f"weights {list(shape)}"
            raise UserError(f"weighter '{self.name}' at step {run.step}: expected {what}, got {got}")
        return answer

    @property
    def identity(self) -> str:
        return f"WeightHook {self.name}"

    def state_dict(self) -> dict[str, Any]:
        return self.weighter.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weighter.load_state_dict(state)
