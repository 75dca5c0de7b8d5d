"""Rows of conditions of which every pair of values occurs: few, where all combinations are many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any

Row = tuple[Any, ...]


def pairs(row: Row) -> set[tuple[int, Any, int, Any]]:
    return {(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)}


def every_pair(axes: Sequence[Sequence[Any]], possible: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Always the row next that has the most pairs which did not occur yet, the first of them."""
    rows = [row for row in product(*axes) if possible(row)]
    left = set().union(*map(pairs, rows))
    chosen = []
    while left:
        best = max(rows, key=lambda row: len(pairs(row) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def every_row(axes: Sequence[Sequence[Any]], possible: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    return [row for row in product(*axes) if possible(row)]
