"""The parameters of an output layer without logits, and where a tied one is looked up as well."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadNames:
    """Names of the parameters asked for: weights by their place among the products' pairs, and the bias."""

    weights: dict[int, str]
    bias: str | None = None

    def every(self) -> list[str]:
        return [*self.weights.values(), *([] if self.bias is None else [self.bias])]


@dataclass(frozen=True)
class Outer:
    """Row [N, M] and col [N, K] of an outer product, and where its samples begin, bounds [S + 1]."""

    row: Tensor
    col: Tensor
    bounds: Tensor


def with_lookups(head: Outer, columns: slice, ids: Tensor, values: Tensor, cu_seqlens: Tensor) -> Outer:
    """``head`` with the tokens of a tied embedding whose ids lie in ``columns``, sample by sample.

    ids: [N]; values: [N, K], the gradients of what was looked up; cu_seqlens: [S + 1], where samples begin in them.
    """
    found = ((ids >= columns.start) & (ids < columns.stop)).nonzero()[:, 0]
    one = torch.zeros(len(found), head.row.shape[1], dtype=head.row.dtype, device=ids.device)
    one.scatter_(1, (ids[found] - columns.start)[:, None], 1.0)
    places = torch.arange(len(head.row), device=ids.device)
    sample = torch.cat([torch.bucketize(places, head.bounds[1:], right=True), _sample_of(found, cu_seqlens)])
    sample, order = torch.sort(sample, stable=True)
    samples = torch.arange(len(cu_seqlens), device=ids.device)
    row, col = torch.cat([head.row, one]), torch.cat([head.col, values[found].to(head.col.dtype)])
    return Outer(row[order], col[order], torch.searchsorted(sample, samples))


def _sample_of(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.bucketize(tokens, cu_seqlens[1:], right=True)
