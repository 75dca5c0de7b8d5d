"""Directions of the trained parameters' size for exact scores: whole where they are small, else each rank a part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dataflex.scoring.gather import all_parts, sum_over_ranks
from dataflex.scoring.gradients import layer_state
from dataflex.utils import dist


class Directions(Mapping[str, Tensor]):
    """{name: float32 [Q, *shape]}, zeros at first, on ``device``.

    Over ``whole_bytes`` (`layer_state.KEPT_BYTES`) in all, each rank keeps its part of every parameter only: 4 Q bytes
    a parameter, divided by the ranks; in the host's memory with ``offload``. To read a name is then a collective, and
    so is `added`.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        queries: int,
        device: torch.device,
        *,
        offload: bool = False,
        whole_bytes: int | None = None,
    ) -> None:
        self.shapes = dict(shapes)
        self.queries = queries
        self._device = device
        most = layer_state.KEPT_BYTES if whole_bytes is None else whole_bytes
        large = 4 * queries * sum(math.prod(shape) for shape in self.shapes.values()) > most
        self.parts = dist.world_size() if large else 1
        where = torch.device("cpu") if offload and large else device
        self._mine = {
            name: torch.zeros(queries, -(-math.prod(shape) // self.parts), device=where)
            for name, shape in self.shapes.items()
        }

    def sum_for(self, name: str, query: int) -> Tensor:
        """Where to add to a direction, in the parameter's shape; `added` takes it from there."""
        mine = self._mine[name][query]
        if self.parts == 1 and mine.device == self._device:
            return mine.view(self.shapes[name])
        return torch.zeros(self.shapes[name], device=self._device)

    def added(self, name: str, query: int, total: Tensor) -> None:
        """Take up what was added to ``total`` of `sum_for`: the ranks' sum where each has a part."""
        mine = self._mine[name][query]
        if self.parts == 1 and mine.device == self._device:
            return
        flat = total.reshape(-1)
        if self.parts > 1:
            sum_over_ranks(flat)
        start = dist.rank() * len(mine) if self.parts > 1 else 0
        own = flat[start : start + len(mine)]
        mine[: len(own)] += own.to(mine.device)

    def complete(self) -> None:
        """Every batch is in: add up what the ranks have of the whole directions."""
        if self.parts == 1:
            for mine in self._mine.values():
                whole = mine.to(self._device)
                sum_over_ranks(whole)
                mine.copy_(whole)

    def __getitem__(self, name: str) -> Tensor:
        shape, mine = self.shapes[name], self._mine[name].to(self._device)
        if self.parts > 1:
            mine = all_parts(mine).transpose(0, 1).reshape(self.queries, -1)
        return mine[:, : math.prod(shape)].view(self.queries, *shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
