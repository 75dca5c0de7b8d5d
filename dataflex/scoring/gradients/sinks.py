"""Where taps deliver: `ProjectingSink` folds each layer into features while the backward runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from dataflex.ops import (
    Projection,
    Sums,
    Transform,
    project_dense_,
    project_per_sample_grad_,
    project_rows_,
    project_zero,
    tensor_id,
)
from dataflex.ops.known import values_of, with_values
from dataflex.ops.losses.linear_deltas import LinearLossGrad
from dataflex.scoring.gather import whole
from dataflex.scoring.gradients.head_parts import HeadNames, Outer, with_lookups
from dataflex.scoring.gradients.layer_state import LayerState

_COLUMNS = 4096  # rows of a tied matrix at a time

Moments = Mapping[str, tuple[Tensor, Tensor]]


def segment_sums(per_token: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N, K] to [S, K], summed in float32 at least."""
    wide = per_token if per_token.dtype is torch.float64 else per_token.float()
    return torch.segment_reduce(wide, "sum", lengths=cu_seqlens.diff(), axis=0, unsafe=True)


def as_matrix(parameter: Tensor) -> Tensor:
    """How the projections see a parameter: [M, K], all but the last dimension flattened; a vector or scalar is [K]."""
    return parameter.reshape(-1, parameter.shape[-1]) if parameter.dim() > 1 else parameter.reshape(-1)


@dataclass
class ProjectingSink:
    """Adds every layer's transformed per-sample gradient to the batch's totals as soon as it is delivered.

    With proj_dim > 0 its projection becomes part of the features ``totals.out``; with proj_dim 0 nothing is
    projected, but its squared norm and its inner products with ``directions`` {name: [Q, ...]}, Q ``queries``, are
    added.
    Call `start` before each batch, `at_hand` around what is delivered of some parameters and `finish` after the
    backward: moments and directions of the parameters' size are there inside of `at_hand` only. A parameter that
    several modules share (tied embeddings) waits for `finish`, because the transform needs the complete gradient.
    factors: of `LayerRule`.
    dtype: of the totals and of what is summed into them.
    """

    transform: Transform
    seed: int
    proj_dim: int
    moments: Moments
    projection: str = "xorfold"
    shared: frozenset[str] = frozenset()
    factors: Mapping[str, float] = field(default_factory=dict)
    directions: Mapping[str, Tensor] = field(default_factory=dict)
    queries: int = 0
    scale: float = 1.0
    dtype: torch.dtype = torch.float32
    cu_seqlens: Tensor = field(init=False)
    _by_factor: dict[float, Sums] = field(default_factory=dict)
    _waiting: dict[str, list[tuple[str, Tensor, Tensor]]] = field(default_factory=dict)
    _heads: list[tuple[HeadNames, LinearLossGrad]] = field(default_factory=list)
    _zero: dict[str, Sums] = field(default_factory=dict)
    per_sample: ClassVar[bool] = True

    def start(self, cu_seqlens: Tensor) -> None:
        self.cu_seqlens = cu_seqlens
        self._by_factor, self._waiting, self._heads = {}, {}, []

    @contextmanager
    def at_hand(self, names: Iterable[str]) -> Iterator[None]:
        """Inside, what is of the size of these parameters is there; on every rank in the same order."""
        wanted = [name for name in names if name not in self.shared]
        with self._holding(wanted):
            yield

    @contextmanager
    def _holding(self, names: Iterable[str]) -> Iterator[None]:
        with ExitStack() as stack:
            for state in (self.moments, self.directions):
                if isinstance(state, LayerState):
                    stack.enter_context(state.at_hand(names))
            yield

    def outer(self, name: str, row: Tensor, col: Tensor, per_token: int = 1) -> None:
        if name in self.shared:
            assert per_token == 1, f"{name} is tied and has several rows for a token"
            self._waiting.setdefault(name, []).append(("outer", row, col))
        else:
            self._outer(name, row, col, self._bounds(per_token))

    def _bounds(self, per_token: int) -> Tensor:
        """Where samples begin among rows of which each token has ``per_token``."""
        if per_token == 1:
            return self.cu_seqlens
        return with_values(self.cu_seqlens * per_token, [per_token * b for b in values_of(self.cu_seqlens)])

    def dense(self, name: str, per_token: Tensor) -> None:
        grad = segment_sums(per_token, self.cu_seqlens).mul_(self.scale)
        project_dense_(self._totals(name), grad, self._how(name))

    def rows(self, name: str, row_ids: Tensor, values: Tensor) -> None:
        if name in self.shared:
            self._waiting.setdefault(name, []).append(("rows", row_ids, values))
        else:
            self._rows(self._totals(name), name, row_ids, values, self.cu_seqlens)

    def experts(self, name: str, row: Tensor, col: Tensor, tokens: Tensor, counts: list[int]) -> None:
        """The parameter counts as the matrix [E * M, K] of its experts one below the other."""
        start = 0
        for e, count in enumerate(counts):
            if count or self.transform.needs_moments:
                part = slice(start, start + count)
                bounds = torch.searchsorted(tokens[part].contiguous(), self.cu_seqlens)
                self._outer(name, row[part], col[part], bounds, (e, len(counts)))
            start += count

    def head(self, names: HeadNames, grad: LinearLossGrad) -> None:
        if self.shared & set(names.weights.values()):
            self._heads.append((names, grad))
        else:
            self._head(names, grad)

    def sample(self, name: str, sample: int, grad: Tensor) -> None:
        """The parameter counts as a matrix (`as_matrix`), a vector as one row."""
        sums = self._totals(name).of(sample)
        if grad.dim() < 2:
            project_dense_(sums, grad.reshape(1, -1) * self.scale, self._how(name))
            return
        values = as_matrix(grad)
        rows = torch.arange(len(values), device=values.device)
        self._rows(sums, name, rows, values, torch.arange(2, device=values.device) * len(values))

    def finish(self) -> Sums:
        """The batch's totals, after the parameters that waited were added."""
        for names, grad in self._heads:
            with whole([weight for _, weight in grad.products.pairs]), self._holding(names.every()):
                self._head(names, grad)
        for name, parts in self._waiting.items():
            with self._holding([name]):
                self._combined(name, parts)
        self._waiting, self._heads = {}, []
        total = self._new_totals(len(self.cu_seqlens) - 1)
        for factor, totals in self._by_factor.items():
            total.add(totals, factor)
        return total

    def _new_totals(self, samples: int) -> Sums:
        return Sums.zeros(samples, self.proj_dim, self.queries, device=self.cu_seqlens.device, dtype=self.dtype)

    def _totals(self, name: str) -> Sums:
        factor = self.factors.get(name, 1.0)
        if factor not in self._by_factor:
            self._by_factor[factor] = self._new_totals(len(self.cu_seqlens) - 1)
        return self._by_factor[factor]

    def _how(self, name: str, part: tuple[int, int] | None = None) -> Projection:
        """Of parameter ``name``; part: (e, E), of expert e's matrix among E."""
        m, v = self.moments.get(name, (None, None))
        toward = self.directions.get(name)
        if part is not None:
            e, count = part
            m, v = (None if x is None else x.reshape(count, -1, x.shape[-1])[e] for x in (m, v))
            toward = None if toward is None else toward.reshape(len(toward), count, -1, toward.shape[-1])[:, e]
        else:
            m, v = (None if x is None else as_matrix(x) for x in (m, v))
            toward = None if toward is None else torch.stack([as_matrix(d) for d in toward])
        return Projection(tensor_id(name), self.seed, self.transform, self.projection, m, v, toward)

    def _outer(self, name: str, row: Tensor, col: Tensor, bounds: Tensor, part: tuple[int, int] | None = None) -> None:
        how = self._how(name, part)
        if part is not None:
            how = replace(how, row_offset=part[0] * row.shape[1])
        project_per_sample_grad_(self._totals(name), row, col, bounds, how, self.scale)

    def _rows(self, sums: Sums, name: str, row_ids: Tensor, values: Tensor, bounds: Tensor) -> None:
        base = self._zero_of(name, values.shape[1])
        project_rows_(sums, row_ids, values, bounds, self._how(name), self.scale, base)

    def _head(self, names: HeadNames, grad: LinearLossGrad) -> None:
        """Block by block of the vocabulary; where an embedding is tied to it, with what waits of that."""
        bounds, biases = grad.bounds(self.cu_seqlens), []
        uses = [
            (name, self._how(name), grad.inputs(at), self._waiting.pop(name, [])) for at, name in names.weights.items()
        ]
        for columns, delta in grad.blocks():
            for name, how, col, lookups in uses:
                part = Outer(delta, col.to(delta.dtype), bounds)
                for kind, ids, values in lookups:
                    assert kind == "rows", f"{name} is tied to a layer that is no embedding"
                    part = with_lookups(part, columns, ids, values, self.cu_seqlens)
                sums = self._totals(name)
                project_per_sample_grad_(sums, part.row, part.col, part.bounds, how.rows(columns), self.scale)
            if names.bias is not None:
                biases.append(segment_sums(delta, bounds))
        if names.bias is not None:
            of_bias = torch.cat(biases, 1).mul_(self.scale)
            project_dense_(self._totals(names.bias), of_bias, self._how(names.bias))

    def _combined(self, name: str, parts: list[tuple[str, Tensor, Tensor]]) -> None:
        """A tied matrix: its uses become more tokens of one outer product, block by block of its rows."""
        vocabulary = max(row.shape[1] for kind, row, _ in parts if kind == "outer")
        bounds, how = self._bounds(len(parts)), self._how(name)
        place = torch.arange(len(parts[0][1]), device=bounds.device)
        sample = torch.bucketize(place, self.cu_seqlens[1:], right=True)
        order = torch.argsort(sample.repeat(len(parts)), stable=True)
        col = torch.cat([right.to(self.dtype) for _, _, right in parts])[order]
        for start in range(0, vocabulary, _COLUMNS):
            columns = slice(start, min(start + _COLUMNS, vocabulary))
            row = torch.cat([self._rows_of(kind, left, columns) for kind, left, _ in parts])[order]
            project_per_sample_grad_(self._totals(name), row, col, bounds, how.rows(columns), self.scale)

    def _rows_of(self, kind: str, left: Tensor, columns: slice) -> Tensor:
        """Rows ``columns`` of a use of a tied matrix, [N, columns]: a lookup is a one where the token's id is."""
        if kind == "outer":
            return left[:, columns].to(self.dtype)
        inside = (left >= columns.start) & (left < columns.stop)
        place = (left - columns.start).clamp(0, columns.stop - columns.start - 1)
        one = torch.zeros(len(left), columns.stop - columns.start, device=left.device, dtype=self.dtype)
        return one.scatter_(1, place[:, None], inside.to(self.dtype)[:, None])

    def _zero_of(self, name: str, columns: int) -> Sums | None:
        """What the rows of an embedding that a sample does not touch contribute; once per pass."""
        if not self.transform.needs_moments:
            return None
        if name not in self._zero:
            shape = (as_matrix(self.moments[name][0]).shape[0], columns)
            self._zero[name] = project_zero(self._new_totals(1), shape, self._how(name))
        return self._zero[name]
