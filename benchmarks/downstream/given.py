"""A selector that takes the picks of a file: so all ways to choose are trained by the same run of dataflex."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dataflex.core.registry import register_selector
from dataflex.train.selector.base_selector import Selector


@register_selector("given")
class GivenSelector(Selector):
    """The sample ids in ``picks``, a JSON list; an id may be there more than once."""

    replacement = True
    takes_domain_counts = False

    def __init__(self, dataset: Any, accelerator: Any, data_collator: Any, cache_dir: Any, picks: str) -> None:
        super().__init__(dataset, accelerator, data_collator, cache_dir)
        self.picks: list[int] = json.loads(Path(picks).read_text(encoding="utf-8"))

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        assert num_samples == len(self.picks), f"{len(self.picks)} picks for {num_samples} places"
        return self.picks
