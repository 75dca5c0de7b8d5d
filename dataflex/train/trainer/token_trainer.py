"""The hook that asks a weighter of tokens: unweighted in the warm-up, then at every micro-batch."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dataflex.core.context import Run
from dataflex.core.hook import TokenWeigher
from dataflex.ops.losses.token_rules import TokenRows, TokenRule
from dataflex.train.weighter.token_weighter import TokenWeighter
from dataflex.utils.errors import UserError


class TokenWeightHook(TokenWeigher):
    """Asks ``weighter`` from step ``warmup_step`` on."""

    def __init__(self, weighter: TokenWeighter, name: str, warmup_step: int) -> None:
        self.weighter, self.name, self.warmup_step = weighter, name, warmup_step
        self.late = weighter.relative

    def rule(self, run: Run) -> TokenRule | None:
        return None if run.step < self.warmup_step else self._numbers

    def _numbers(self, rows: TokenRows) -> Tensor:
        return self._checked(self.weighter.of_logits(rows), rows.labels)

    def weigh_tokens(self, run: Run, micro: Any, numbers: Tensor) -> Tensor:
        return self._checked(self.weighter.among(numbers, micro), micro.labels)

    def _checked(self, answer: Any, labels: Tensor) -> Tensor:
        """UserError unless the answer is a number for each label."""
        if not torch.is_tensor(answer) or answer.shape != labels.shape:
            got = tuple(answer.shape) if torch.is_tensor(answer) else type(answer).__name__
            raise UserError(f"weighter '{self.name}': expected numbers {list(labels.shape)}, one per token, got {got}")
        return answer

    @property
    def identity(self) -> str:
        return f"TokenWeightHook {self.name}"

    @property
    def compared(self) -> Literal["", "global micro-batch"]:
        return "global micro-batch" if self.weighter.relative else ""

    @property
    def needs_logits(self) -> bool:
        """A weighter of tokens is shown them chunk by chunk."""
        return False
