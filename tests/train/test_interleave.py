"""How long a pass over interleaved datasets is: as LLaMA-Factory's, which draws with `datasets.interleave_datasets`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.config import load_config
from dataflex.data.pool import Pool
from dataflex.train.mixer.interleave import interleaved
from dataflex.train.trainer.build import pass_rows
from dataflex.utils.errors import UserError


@pytest.mark.parametrize(
    ("sizes", "shares", "over", "low", "high"),
    [
        ((40, 24), None, False, 48, 48),
        ((40, 24), None, True, 80, 80),
        # until 200 of a share of 0.5 are drawn: 400 give or take a few standard deviations of 20
        ((200, 1000), (1, 1), False, 320, 480),
        ((200, 1000), (1, 1), True, 1820, 2180),
        ((200, 0), (1, 0), False, 200, 200),
    ],
)
def test_a_pass_ends_with_the_first_or_the_last_dataset(
    sizes: tuple[int, ...], shares: tuple[float, ...] | None, over: bool, low: int, high: int
) -> None:
    assert low <= interleaved(sizes, shares, over, 3) <= high


def pool(sizes: tuple[int, ...], lengths: tuple[int, ...]) -> Any:
    """Domains of these sizes, of samples that are all as long."""
    found = object.__new__(Pool)
    ids = np.repeat(np.arange(len(sizes)), sizes)
    found.__dict__ |= {"domain_names": ["a", "b"], "domain_ids": ids, "lengths": np.repeat(lengths, sizes)}
    return found


def rows(of: Any, packing: Any = None, **keys: Any) -> int | None:
    return pass_rows(load_config({"dataset": "a,b", **keys}, embedded=True, quiet=True), of, packing)


def test_what_counts_is_the_seed_and_the_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "domain_sizes", lambda self: np.bincount(self.domain_ids, minlength=2))
    monkeypatch.setattr(Pool, "size", property(lambda self: len(self.domain_ids)))
    of = pool((200, 1000), (10, 40))
    asked = {"mix_strategy": "interleave_under", "interleave_probs": [1, 1], "seed": 3}
    assert rows(of) == 1200
    assert rows(of, **asked) == interleaved((200, 1000), (1.0, 1.0), False, 3)
    assert rows(of, **asked | {"data_seed": 4}) == rows(of, **asked)
    # 100 of each take 100 x 10 + 100 x 40 tokens, of 42,000 in 420 packs: 50 packs
    packing: Any = SimpleNamespace(pool=SimpleNamespace(rows=420), lengths=of.lengths)
    monkeypatch.setattr("dataflex.train.trainer.build.interleaved", lambda *_: 200)
    assert rows(of, packing, **asked) == 50
    with pytest.raises(UserError, match="dataset: 'b' has no samples, so no pass that interleaves it has an end"):
        rows(pool((200, 0), (10, 40)), **asked)
