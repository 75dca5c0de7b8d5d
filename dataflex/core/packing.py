"""Samples into rows of a fixed number of tokens: packs. Pure functions of their arguments, as plans are."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.plan import Ids, Plan

BUFFER = 1000
"""The samples that rows are filled from at a time: LLaMA-Factory's preprocessing_batch_size."""
_BISECTS_AFTER = 8

Draw = Callable[[int], Plan]


def pack(lengths: NDArray[np.integer[Any]], capacity: int, buffer: int = BUFFER) -> tuple[Ids, Ids]:
    """Samples row by row: their order, int64 [n], and where each row starts in it and the last one ends, int64 [R + 1].

    lengths: tokens of each sample, int [n], 1 to capacity. Of each ``buffer`` samples rows take the longest that is
    left and then, while one fits, the longest that does; both rows and the samples of a row are in the order given.
    buffer 1: next fit, which changes no order.
    """
    if buffer == 1:
        return np.arange(len(lengths), dtype=np.int64), _next_fit(lengths.tolist(), capacity)
    order: list[int] = []
    starts = [0]
    for first in range(0, len(lengths), buffer):
        for row in _longest_first(lengths[first : first + buffer].tolist(), capacity):
            order += [first + place for place in row]
            starts.append(len(order))
    return np.array(order, dtype=np.int64), np.array(starts, dtype=np.int64)


def _longest_first(lengths: list[int], capacity: int) -> list[list[int]]:
    """Places row by row, ascending in each, the rows by their first ones."""
    size = len(lengths)
    # Sorted by length, the first of equal ones last: it is then the first to be taken.
    left = sorted(length * size + size - 1 - place for place, length in enumerate(lengths))
    rows = []
    while left:
        row, room = [], capacity
        while (fitting := bisect_right(left, room * size + size - 1)) > 0:
            length, behind = divmod(left.pop(fitting - 1), size)
            row.append(size - 1 - behind)
            room -= length
        rows.append(sorted(row))
    return sorted(rows)


def _next_fit(lengths: list[int], capacity: int) -> Ids:
    starts, room = [0], capacity
    for place, length in enumerate(lengths):
        if length > room:
            starts.append(place)
            room = capacity
        room -= length
    return np.array(starts + [len(lengths)] * bool(lengths), dtype=np.int64)


def _split(starts: Ids, rows: int) -> Ids:
    """``starts`` of so many rows: those of the most samples are halved."""
    while len(starts) <= rows:
        widest = int(np.diff(starts).argmax())
        starts = np.insert(starts, widest + 1, (starts[widest] + starts[widest + 1]) // 2)
    return starts


@dataclass(frozen=True, eq=False)
class Packing:
    """How samples of a pool share rows of up to ``capacity`` tokens.

    lengths: tokens of each sample, int [pool], 1 to capacity.
    """

    lengths: NDArray[np.integer[Any]]
    capacity: int

    @cached_property
    def pool(self) -> Plan:
        """The rows of all samples, in the pool's order: those of one pass."""
        samples = len(self.lengths)
        return self.packed(Plan(np.arange(samples, dtype=np.int64), np.full(samples, 1.0 / samples)))

    def fill(self, plan: Plan) -> float:
        """Tokens of a packed plan / tokens that its rows have room for."""
        return float(self.lengths[plan.sample_ids].sum()) / (plan.rows * self.capacity)

    def packed(self, plan: Plan, keeps_order: bool = False) -> Plan:
        """The samples of a plan without rows, row by row."""
        order, starts = pack(self.lengths[plan.sample_ids], self.capacity, 1 if keeps_order else BUFFER)
        return Plan(plan.sample_ids[order], plan.probabilities[order], starts)

    def filled(
        self,
        draw: Draw,
        rows: int,
        most: int | None = None,
        *,
        keeps_order: bool = False,
        asks: int = 24,
        enough: float = 0.995,
    ) -> Plan:
        """Exactly ``rows`` rows, of about as many samples as fit into them.

        draw: a plan without rows of so many samples. It is called for one number after the other: until the samples
        that fit are ``enough`` of what as many rows of the pool hold, one more does not fit, or it was called ``asks``
        times and some fit. most: samples that can be drawn, at least ``rows``; None: any number. Where the samples
        need fewer rows, some are halved.
        """
        assert most is None or most >= rows, (most, rows)
        wanted = enough * self.fill(self.pool) * rows * self.capacity
        high = 1 + (most if most is not None else rows * self.capacity // int(self.lengths.min()))
        low, best = rows - 1, None
        asked = int(rows * self.capacity / self.lengths.mean())
        for ask in count(1):
            asked = min(max(asked, low + 1), high - 1)
            plan = self.packed(draw(asked), keeps_order)
            surplus = plan.rows - rows
            low, high, best = (asked, high, plan) if surplus <= 0 else (low, asked, best)
            full = surplus <= 0 and self.lengths[plan.sample_ids].sum() >= wanted
            if full or (best is not None and (high - low <= 1 or ask >= asks)):
                break
            a_row = len(plan.sample_ids) / plan.rows
            asked -= int(surplus * a_row) if surplus else -max(1, int(a_row / 2))
            asked = asked if ask < _BISECTS_AFTER else (low + high) // 2
        assert best is not None
        return Plan(best.sample_ids, best.probabilities, _split(_starts(best), rows))


def drawn(packing: Packing | None, draw: Draw, rows: int, most: int | None = None, **how: Any) -> Plan:
    """A plan of ``rows`` rows: of a sample each, or as `Packing.filled` makes them; most, how: for that."""
    return draw(rows) if packing is None else packing.filled(draw, rows, most, **how)


def _starts(plan: Plan) -> Ids:
    assert plan.starts is not None
    return plan.starts
