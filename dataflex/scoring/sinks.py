"""Where taps deliver: `ProjectingSink` folds each layer into features while the backward runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dataflex.ops import (
    Transform,
    project_dense_,
    project_per_sample_grad_,
    project_rows_,
    project_zero,
    tensor_id,
)

Moments = Mapping[str, tuple[Tensor, Tensor]]


def segment_sums(per_token: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N, K] to [S, K], summed in float32 at least."""
    wide = per_token if per_token.dtype is torch.float64 else per_token.float()
    return torch.segment_reduce(wide, "sum", lengths=cu_seqlens.diff(), axis=0, unsafe=True)


@dataclass
class ProjectingSink:
    """Adds every layer's projected, transformed per-sample gradient to ``out`` as soon as it is delivered.

    out: [S, proj_dim] float32, to be set with ``cu_seqlens`` before each batch (`start`); call `finish` after
    its backward. A parameter that several modules share (tied embeddings) waits for `finish`, because the
    transform needs the complete gradient.
    """

    transform: Transform
    seed: int
    proj_dim: int
    moments: Moments
    shared: frozenset[str] = frozenset()
    scale: float = 1.0
    out: Tensor = field(init=False)
    cu_seqlens: Tensor = field(init=False)
    _waiting: dict[str, list[tuple[str, Tensor, Tensor]]] = field(default_factory=dict)
    _zero: dict[str, Tensor] = field(default_factory=dict)

    def start(self, cu_seqlens: Tensor, device: torch.device) -> None:
        self.cu_seqlens = cu_seqlens
        self.out = torch.zeros(len(cu_seqlens) - 1, self.proj_dim, device=device)
        self._waiting = {}

    def outer(self, name: str, row: Tensor, col: Tensor) -> None:
        if name in self.shared:
            self._waiting.setdefault(name, []).append(("outer", row, col))
        else:
            project_per_sample_grad_(self.out, row, col, self.cu_seqlens, scale=self.scale, **self._how(name))

    def dense(self, name: str, per_token: Tensor) -> None:
        grad = segment_sums(per_token, self.cu_seqlens).mul_(self.scale)
        project_dense_(self.out, grad, **self._how(name))

    def rows(self, name: str, row_ids: Tensor, values: Tensor) -> None:
        if name in self.shared:
            self._waiting.setdefault(name, []).append(("rows", row_ids, values))
        else:
            base = self._zero_of(name, values.shape[1])
            project_rows_(self.out, row_ids, values, self.cu_seqlens, base=base, scale=self.scale, **self._how(name))

    def finish(self) -> Tensor:
        """The batch's features, after the parameters that waited were added."""
        for name, parts in self._waiting.items():
            self._combined(name, parts)
        self._waiting = {}
        return self.out

    def _how(self, name: str) -> dict[str, Any]:
        """The arguments that every projection of parameter ``name`` shares."""
        m, v = self.moments.get(name, (None, None))
        return {
            "transform": self.transform,
            "seed": self.seed,
            "tensor_id": tensor_id(name),
            "exp_avg": m,
            "exp_avg_sq": v,
        }

    def _combined(self, name: str, parts: list[tuple[str, Tensor, Tensor]]) -> None:
        """A tied matrix: its uses become more tokens of one outer product, sample by sample."""
        vocabulary = max(row.shape[1] for kind, row, _ in parts if kind == "outer")
        bounds: list[int] = self.cu_seqlens.tolist()
        for sample, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            row, col = [], []
            for kind, left, right in parts:
                mine = F.one_hot(left[a:b], vocabulary) if kind == "rows" else left[a:b]
                row.append(mine.to(self.out.dtype))
                col.append(right[a:b].to(self.out.dtype))
            out = self.out[sample : sample + 1]
            cu = torch.tensor([0, len(parts) * (b - a)], device=out.device)
            project_per_sample_grad_(out, torch.cat(row), torch.cat(col), cu, scale=self.scale, **self._how(name))

    def _zero_of(self, name: str, columns: int) -> Tensor:
        """What the rows of an embedding that a sample does not touch contribute; once per pass."""
        if name not in self._zero:
            m, _ = self.moments.get(name, (None, None))
            rows = 0 if m is None else m.shape[0]
            self._zero[name] = project_zero((rows, columns), self.proj_dim, **self._how(name))
        return self._zero[name].to(self.out.device)
