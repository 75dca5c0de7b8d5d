"""`loss`: samples drawn by how large their loss is now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.plan import generator
from dataflex.core.registry import register_selector
from dataflex.core.sampling import weighted_draw
from dataflex.scoring.scorer import Scorer
from dataflex.train.selector.base_selector import Selector
from dataflex.utils.errors import UserError, nearest

BUCKETS = ("low", "medium", "high")


def bucket_weights(
    losses: NDArray[Any], *, focus: str, focus_weight: float, quantiles: Sequence[float], temperature: float
) -> NDArray[np.float64]:
    """Unnormalised probability of each sample, float64 [n].

    losses: [n]. Two quantiles cut them into low, medium and high; the bucket in ``focus`` weighs
    ``focus_weight``, the others 1, all to the power 1 / temperature. A non-finite loss weighs 0.
    """
    valid = np.isfinite(losses)
    if not valid.any():
        raise UserError("loss selector: no sample of the pool has a finite loss")
    low, high = np.quantile(losses[valid].astype(np.float64), quantiles)
    place = np.where(losses <= low, 0, np.where(losses <= high, 1, 2))
    weight = np.where(place == BUCKETS.index(focus), focus_weight, 1.0) ** (1.0 / temperature)
    return np.where(valid, weight, 0.0)


@register_selector("loss")
class LossSelector(Selector):
    """Draws from the current losses, with more weight on the low, medium or high third.

    focus: low, medium or high. focus_weight: how many times likelier that bucket's samples are. quantiles: the
    two cuts. replacement: draw with replacement. temperature: > 1 flattens, < 1 sharpens. seed: int.
    """

    takes_domain_counts = True

    def __init__(
        self,
        dataset: Any,
        accelerator: Any,
        data_collator: Any,
        cache_dir: Any,
        scorer: Scorer,
        focus: str = "high",
        focus_weight: float = 5.0,
        quantiles: Sequence[float] = (0.33, 0.66),
        replacement: bool = False,
        temperature: float = 1.0,
        seed: int = 42,
    ) -> None:
        super().__init__(dataset, accelerator, data_collator, cache_dir)
        if focus not in BUCKETS:
            raise UserError(f"loss selector: focus: '{focus}'{nearest(focus, BUCKETS)}; valid: {', '.join(BUCKETS)}")
        if len(quantiles) != 2 or not 0 <= quantiles[0] <= quantiles[1] <= 1:
            raise UserError(f"loss selector: quantiles: expected 0 <= low <= high <= 1, got {list(quantiles)}")
        if focus_weight <= 0 or temperature <= 0:
            raise UserError("loss selector: focus_weight and temperature must be > 0")
        self.scorer = scorer
        self.focus, self.focus_weight, self.quantiles = focus, focus_weight, tuple(quantiles)
        self.replacement, self.temperature, self.seed = replacement, temperature, seed

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        losses = self.once(step_id, self.scores)
        weights = bucket_weights(
            losses,
            focus=self.focus,
            focus_weight=self.focus_weight,
            quantiles=self.quantiles,
            temperature=self.temperature,
        )
        draw = generator(self.seed, "loss_selector", step_id)
        picks = self.pick_by_domain(
            num_samples,
            kwargs.get("domain_counts"),
            lambda ids, count: ids[weighted_draw(weights[ids], count, replacement=self.replacement, draw=draw)],
        )
        self.metric, self.scored = {"loss": losses[picks].tolist()}, {"score": losses}
        return picks.tolist()

    def scores(self) -> NDArray[np.float32]:
        """Loss of every sample of the pool with the model as it is now, float32 [n]."""
        return self.scorer.losses(self.dataset)[0]
