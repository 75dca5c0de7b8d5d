"""The base class of weighters of tokens: they say how much each token counts, from its own logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from dataflex.ops.losses.token_rules import TokenRows


class TokenWeighter(ABC):
    """Multiplies the loss of each token, whatever else multiplies it: class, role and sample weights, a mixer.

    The weights have no gradient and do not change what the loss is divided by, so the step is as much smaller as they
    are on average (``token_weight_mean`` in the log).

    relative: `of_logits` gives numbers that `among` makes weights of, when those of all tokens of the micro-batch are
    there. Else they are the weights, and the gradient is made with the losses where the samples' weights are known too.
    """

    relative: bool = False

    @abstractmethod
    def of_logits(self, rows: TokenRows) -> Tensor:
        """A number for each of some tokens, [n], from their logits [n, V]; called chunk by chunk, without gradient."""

    def among(self, numbers: Tensor, micro: Any) -> Tensor:
        """Weights [N] >= 0 from the numbers [N] of a micro-batch's tokens, 0 for one that does not count.

        Every rank is called at the same point. micro: the `dataflex.engine.steps.batches.MicroBatch`.
        """
        raise NotImplementedError(f"{type(self).__name__}: relative = True needs `among`")
