"""Weighted draws from pools of any size, in float64: `torch.multinomial` takes at most 2^24 categories."""

from __future__ import annotations

import numpy as np

from dataflex.core.plan import Floats, Ids
from dataflex.utils.errors import UserError

_CHUNK = 1 << 20


def weighted_draw(weights: Floats, count: int, *, replacement: bool, draw: np.random.Generator) -> Ids:
    """``count`` indices drawn in proportion to ``weights`` [n].

    Without replacement by Gumbel top-k: the order of draws is that of successive sampling (Kool et al., arXiv
    1903.06059); UserError where fewer than ``count`` weights are positive.
    """
    if not replacement:
        return distinct_draw(weights, count, draw)[0]
    edges = np.cumsum(weights)
    found = np.searchsorted(edges, draw.random(count) * edges[-1], side="right")
    last: np.integer = np.flatnonzero(weights)[-1]
    ids: Ids = np.minimum(found, last).astype(np.int64)
    return ids


def distinct_draw(weights: Floats, count: int, draw: np.random.Generator) -> tuple[Ids, Floats]:
    """``count`` distinct indices in the order of successive sampling, int64, and their inclusion probabilities.

    Each index has the key ln w + Gumbel noise, and the largest keys win. The probability is that of its key to
    exceed the largest losing key k, 1 - exp(-exp(ln w - k)), so that the sum of f / probability over the drawn
    indices has the expectation sum f over all (Kool et al., arXiv 1903.06059, section 4). Memory: ``count``.
    """
    available = int((weights > 0).sum())
    if available < count:
        raise UserError(
            f"asked for {count} samples, but only {available} can be drawn; set replacement: true or ask for fewer "
            "(update_step x global batch)"
        )
    best, keys = np.empty(0, dtype=np.int64), np.empty(0)
    for start in range(0, len(weights), _CHUNK):
        part = weights[start : start + _CHUNK]
        with np.errstate(divide="ignore"):
            more = np.log(part) + draw.gumbel(size=len(part))
        keys = np.concatenate([keys, more])
        best = np.concatenate([best, np.arange(start, start + len(part))])
        if len(keys) > count + 1:
            kept = np.argpartition(-keys, count)[: count + 1]
            best, keys = best[kept], keys[kept]
    order = np.argsort(-keys, kind="stable")
    ids: Ids = best[order[:count]].astype(np.int64)
    losing = keys[order[count]] if len(keys) > count else -np.inf
    with np.errstate(over="ignore"):
        included: Floats = -np.expm1(-np.exp(np.log(weights[ids]) - losing))
    return ids, included
