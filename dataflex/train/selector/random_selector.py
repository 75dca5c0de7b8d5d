"""`random`: a new draw at each decision."""

from __future__ import annotations

from typing import Any

from dataflex.core.plan import generator
from dataflex.core.registry import register_selector
from dataflex.train.selector.base_selector import Selector


@register_selector("random")
class RandomSelector(Selector):
    """Uniform samples, seeded by (seed, step); the baseline of every selector.

    seed: int. replacement: draw with replacement.
    """

    takes_domain_counts = True

    def __init__(
        self,
        dataset: Any,
        accelerator: Any,
        data_collator: Any,
        cache_dir: Any,
        seed: int = 42,
        replacement: bool = False,
    ) -> None:
        super().__init__(dataset, accelerator, data_collator, cache_dir)
        self.seed = seed
        self.replacement = replacement

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        draw = generator(self.seed, "random_selector", step_id)
        return self.pick_by_domain(
            num_samples,
            kwargs.get("domain_counts"),
            lambda ids, count: ids[draw.choice(len(ids), count, replace=self.replacement)],
        ).tolist()
