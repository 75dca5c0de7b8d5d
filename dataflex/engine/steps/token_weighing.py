"""The weights that a `TokenWeigher` among the hooks gives the tokens of a step, and what the log says of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dataflex.core.context import Run
from dataflex.core.hook import Hook, TokenWeigher
from dataflex.engine.steps.batches import MicroBatch
from dataflex.ops.losses.token_rules import TokenRule
from dataflex.utils.errors import UserError


class TokenWeighing:
    """sums: of this rank's part of the step: its loss without the tokens' weights, these weights, and how many; [3]."""

    sums: Tensor

    def __init__(self, hooks: Sequence[Hook]) -> None:
        found = [hook for hook in hooks if isinstance(hook, TokenWeigher)]
        if len(found) > 1:
            names = " and ".join(hook.identity for hook in found)
            raise UserError(f"{names} both weigh tokens; a run takes one of them")
        self.hook = found[0] if found else None

    def start(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, device=device)

    def rule(self, run: Run) -> tuple[TokenRule | None, bool]:
        """What is made of each token's logits, and whether its weight is known only after the forward."""
        rule = None if self.hook is None else self.hook.rule(run)
        return rule, rule is not None and self.hook is not None and self.hook.late

    def weights(self, run: Run, micro: MicroBatch, numbers: Tensor | None) -> Tensor | None:
        """[N] of what the rule made."""
        if self.hook is None or numbers is None or not self.hook.late:
            return numbers
        weights: Tensor = self.hook.weigh_tokens(run, micro, numbers)
        return weights

    def note(self, micro: MicroBatch, plain: Tensor, by_token: Tensor) -> None:
        """plain: the micro-batch's part of the loss without ``by_token`` [N]."""
        counted = micro.labels != -100
        weights = torch.where(counted, by_token, 0.0)
        self.sums += torch.stack([plain.detach(), weights.sum(), counted.sum()]).to(self.sums)

    @staticmethod
    def report(run: Run, plain: float, total: float, count: float) -> None:
        """Give the log the sums of all ranks; nothing where no token was weighed."""
        if count:
            run.figures |= {"plain_loss": plain, "token_weight_mean": total / count}
