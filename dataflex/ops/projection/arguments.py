"""What projection ops are given besides gradients: where they add to, and what is done with a matrix's gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """out [S, proj_dim or 0], sqnorm [S or 0], dots [S, Q or 0]: what is not wanted is empty."""

    out: Tensor
    sqnorm: Tensor
    dots: Tensor

    @property
    def samples(self) -> int:
        return self.out.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.out, self.sqnorm, self.dots


@dataclass(frozen=True)
class Treatment:
    """How the gradients of a matrix [M, K] are transformed, compared and projected.

    exp_avg, exp_avg_sq: [M, K], and coefficients (`transforms.Coefficients`), or None and () for the plain gradient.
    directions: [Q, M, K] or None. kind: place of the projection in `project_kinds.PROJECTIONS`. row_offset, col_offset:
    global position of element (0, 0).
    """

    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    coefficients: tuple[float, ...]
    directions: Tensor | None
    kind: int
    seed: int
    tensor_id: int
    row_offset: int = 0
    col_offset: int = 0

    def rows(self, start: int, end: int) -> Treatment:
        """Of the rows ``start`` to ``end`` of the matrix."""
        part = slice(start, end)
        cut = self.each(lambda x: x[part], lambda x: x[:, part])
        return replace(cut, row_offset=self.row_offset + start)

    def each(self, moment: Callable[[Tensor], Tensor], directions: Callable[[Tensor], Tensor]) -> Treatment:
        """With other moments and directions, where there are some."""
        m, v = (None if x is None else moment(x) for x in (self.exp_avg, self.exp_avg_sq))
        toward = None if self.directions is None else directions(self.directions)
        return replace(self, exp_avg=m, exp_avg_sq=v, directions=toward)

    @property
    def matrices(self) -> list[Tensor]:
        return [x for x in (self.exp_avg, self.exp_avg_sq, self.directions) if x is not None]

    @property
    def flat(self) -> tuple[Any, ...]:
        """In the order of the ops' schemas."""
        moments, where = (self.exp_avg, self.exp_avg_sq), (self.row_offset, self.col_offset)
        return *moments, list(self.coefficients), self.directions, self.kind, self.seed, self.tensor_id, *where
