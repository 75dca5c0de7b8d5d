"""Numbers that are made of a token's logits alone, without gradient: what the weights of tokens are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Columns whose largest is looked at before the columns themselves.
_BLOCK = 64


class TokenRows(NamedTuple):
    """Some tokens' logits [n, V] before their softcap, labels [n] int64 and lse [n], after the softcap.

    No gradient; every token counts.
    """

    logits: Tensor
    labels: Tensor
    lse: Tensor
    softcap: float = 0.0

    def losses(self) -> Tensor:
        """Cross-entropy [n] in lse's dtype, without any weight."""
        at = self.labels.clamp(0, self.logits.shape[1] - 1)[:, None]
        return self.lse - self._capped(self.logits.gather(1, at)[:, 0])

    def largest(self, count: int) -> Tensor:
        """The ``count`` largest logits of each row, largest first, [n, min(count, V)], in lse's dtype.

        They lie in those ``count`` blocks of columns whose own largest are the largest: all columns are read once, and
        sorted are few.
        """
        logits, blocks = self.logits, self.logits.shape[1] // _BLOCK
        if blocks > 2 * count:
            body = logits[:, : blocks * _BLOCK].reshape(len(logits), blocks, _BLOCK)
            best = body.amax(2).topk(count, sorted=False).indices[..., None].expand(-1, -1, _BLOCK)
            logits = torch.cat([body.gather(1, best).flatten(1), logits[:, blocks * _BLOCK :]], 1)
        return self._capped(logits.topk(min(count, logits.shape[1])).values)

    def _capped(self, logits: Tensor) -> Tensor:
        logits = logits.to(self.lse.dtype)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


# One number for each of the rows, [n].
TokenRule = Callable[[TokenRows], Tensor]
