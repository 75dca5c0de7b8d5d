"""What projection ops are given besides gradients: where they add to, and what is done with a matrix's gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dataflex.ops.projection.transforms import Transform


@dataclass(frozen=True)
class Sums:
    """What projections of S samples are added to, in place: float32 or float64, None where not wanted.

    out: [S, proj_dim], the features. sqnorm: [S], squared norms of what is projected. dots: [S, Q], inner products with
    the directions. Those that are given have one dtype and device.
    """

    out: Tensor | None = None
    sqnorm: Tensor | None = None
    dots: Tensor | None = None

    @classmethod
    def zeros(cls, samples: int, proj_dim: int, directions: int = 0, **like: Any) -> Sums:
        """Features where proj_dim > 0, else norms, and inner products where directions > 0. like: dtype, device."""
        if proj_dim:
            return cls(torch.zeros(samples, proj_dim, **like))
        dots = torch.zeros(samples, directions, **like) if directions else None
        return cls(None, torch.zeros(samples, **like), dots)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.out, self.sqnorm, self.dots

    def of(self, sample: int) -> Sums:
        """Those of one sample, S = 1: views."""
        return Sums(*(None if t is None else t[sample : sample + 1] for t in self.tensors))

    def add(self, other: Sums, factor: float) -> None:
        """Add ``other``, whose gradients, but not whose directions, are to count ``factor`` times."""
        for mine, theirs, by in zip(self.tensors, other.tensors, (factor, factor * factor, factor), strict=True):
            if mine is not None and theirs is not None:
                mine.add_(theirs, alpha=by)


@dataclass(frozen=True)
class Projection:
    """One parameter, the matrix [M, K] or vector [K] whose gradients are projected, and how.

    transform: applied to each sample's whole gradient. exp_avg, exp_avg_sq: Adam's moments in the parameter's shape,
    needed unless the transform is sgd. seed: 0 to 2^63 - 1; tensor_id: of the parameter (`tensor_id`), below 2^32.
    kind: one of `project_kinds.PROJECTIONS`. row_offset, col_offset: global position of element (0, 0), for sharded
    matrices. directions: [Q, ...] in the parameter's shape, which `Sums.dots` are the inner products with.
    """

    tensor_id: int
    seed: int
    transform: Transform = Transform()
    kind: str = "xorfold"
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    directions: Tensor | None = None
    row_offset: int = 0
    col_offset: int = 0

    def rows(self, part: slice) -> Projection:
        """Of the rows ``part`` of the matrix."""
        m, v, toward = (
            None if t is None else t[..., part, :] for t in (self.exp_avg, self.exp_avg_sq, self.directions)
        )
        return replace(self, exp_avg=m, exp_avg_sq=v, directions=toward, row_offset=self.row_offset + part.start)


@dataclass(frozen=True)
class Outputs:
    """`Sums` as the ops take them: out [S, proj_dim or 0], sqnorm [S or 0], dots [S, Q or 0]; empty if not wanted."""

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
    """`Projection` as the ops take it: how the gradients of a matrix [M, K] are transformed, compared and projected.

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
