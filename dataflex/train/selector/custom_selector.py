"""`custom`: the smallest selector there is, to copy from."""

from __future__ import annotations

from typing import Any

from dataflex.core.registry import register_selector
from dataflex.train.selector.base_selector import Selector


@register_selector("custom")
class CustomSelector(Selector):
    """Takes the first ``num_samples`` samples of the pool."""

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        return list(range(num_samples))
