"""Where taps deliver for the sum of weighted gradients, which needs no gradient of a single sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from dataflex.ops.losses.linear_deltas import LinearLossGrad
from dataflex.scoring.gradients.directions import Directions
from dataflex.scoring.gradients.head_parts import HeadNames


class DirectionSink:
    """Adds up plain gradients over samples; a sample's weight is the factor of its loss.

    total, query: which of whose directions is added to. factors: of `LayerRule`.
    """

    per_sample: ClassVar[bool] = False

    def __init__(self, total: Directions, query: int, factors: Mapping[str, float]) -> None:
        self.total = total
        self.query = query
        self.sums: dict[str, Tensor] = {}
        self.factors = factors
        self.scale = 1.0

    def start(self, cu_seqlens: Tensor) -> None:
        """Nothing here depends on where samples end."""

    @contextmanager
    def at_hand(self, names: Iterable[str]) -> Iterator[None]:
        """Inside, what is delivered of these parameters is added up; then it becomes part of the direction."""
        mine = [name for name in names if name not in self.sums]
        self.sums |= {name: self.total.sum_for(name, self.query) for name in mine}
        yield
        for name in mine:
            self.total.added(name, self.query, self.sums.pop(name))

    def finish(self) -> None:
        """Nothing waits."""

    def outer(self, name: str, row: Tensor, col: Tensor, per_token: int = 1) -> None:
        self.sums[name].addmm_(row.float().T, col.float(), alpha=self._by(name))

    def dense(self, name: str, per_token: Tensor) -> None:
        self.sums[name].add_(per_token.float().sum(0), alpha=self._by(name))

    def rows(self, name: str, row_ids: Tensor, values: Tensor) -> None:
        self.sums[name].index_add_(0, row_ids, values.float(), alpha=self._by(name))

    def experts(self, name: str, row: Tensor, col: Tensor, tokens: Tensor, counts: list[int]) -> None:
        rows, cols = torch.split(row.float(), counts), torch.split(col.float(), counts)
        parts = self.sums[name].view(len(counts), -1, col.shape[1])
        for part, left, right in zip(parts, rows, cols, strict=True):
            part.addmm_(left.T, right, alpha=self._by(name))

    def head(self, names: HeadNames, grad: LinearLossGrad) -> None:
        inputs = {name: grad.inputs(place).float() for place, name in names.weights.items()}
        for columns, delta in grad.blocks():
            for name, col in inputs.items():
                self.sums[name][columns].addmm_(delta.float().T, col, alpha=self._by(name))
            if names.bias is not None:
                self.sums[names.bias][columns].add_(delta.float().sum(0), alpha=self._by(names.bias))

    def sample(self, name: str, sample: int, grad: Tensor) -> None:
        self.sums[name].add_(grad.float(), alpha=self._by(name))

    def _by(self, name: str) -> float:
        return self.scale * self.factors.get(name, 1.0)
