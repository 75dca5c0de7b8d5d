"""The samples' own weights: what multiplies a loss before any weighter is asked, and how likely a draw is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataflex.core.plan import Floats, Ids


@dataclass(frozen=True, eq=False)
class StaticWeights:
    """loss: multiplier of each sample's loss, float64 [pool] or of streams [domains], or None for 1.

    draw: the probability of each sample in a draw, float64 [pool] of sum 1, or None where the plan is not weighted.
    corrected: multipliers are divided by pool size x the probability of the sample's draw, so that the
    expectation is that of uniform draws. class_weight: float32 [vocabulary] tensor, multiplies token losses, or None.
    tokens: the samples bring weights of their tokens.
    """

    loss: Floats | None = None
    draw: Floats | None = None
    corrected: bool = False
    class_weight: Any = None
    tokens: bool = False

    @property
    def any(self) -> bool:
        """Whether the loss is weighted at all."""
        return self.loss is not None or self.corrected or self.class_weight is not None or self.tokens

    def of(self, rows: Ids, probabilities: Floats, pool_size: int | None) -> Floats | None:
        """Multipliers of the drawn samples' losses, float64 [n]; None for 1. rows: int64 [n], places in ``loss``.

        pool_size: None of streams, whose draws are not corrected.
        """
        weights = None if self.loss is None else self.loss[rows]
        if not self.corrected:
            return weights
        assert pool_size is not None, "the configuration refuses weighted draws of streams"
        correction = 1.0 / (pool_size * probabilities)
        return correction if weights is None else weights * correction

    @property
    def identity(self) -> str:
        """Changes with the weights; the same on every rank."""
        digest = hashlib.sha256(repr((self.corrected, self.tokens)).encode())
        for array in (self.loss, self.draw, None if self.class_weight is None else self.class_weight.cpu().numpy()):
            digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


NO_WEIGHTS = StaticWeights()
