"""The gradient of a linear head's losses by its logits in blocks of the vocabulary, from the log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dataflex.ops.known import counted_positions
from dataflex.ops.losses.linear_products import Products

_BLOCK_BYTES = 32 << 20
# A block has so many columns or a multiple of it: then the products are large and the projections' tiles whole.
_COLUMNS = 1024


@dataclass(frozen=True)
class LinearLossGrad:
    """The gradient of sum(by * token_loss) by what ``products`` make, of which [N, V] never exists at once.

    The losses are those of softcap(scale * products), without smoothing, z-loss and class weights.

    products: pairs (x [N, K], W [V, K]) and bias, whose weights must hold their values when `blocks` is read.
    labels: [N] int64, -100 where a token does not count; lse: [N], as `sweep_losses` gave it; by: [N].
    """

    products: Products
    labels: Tensor
    lse: Tensor
    by: Tensor
    scale: float = 1.0
    softcap: float = 0.0

    @cached_property
    def rows(self) -> Tensor:
        """The positions of the tokens that count: the gradient of the others is 0."""
        return counted_positions(self.labels)

    def bounds(self, cu_seqlens: Tensor) -> Tensor:
        """Where the samples begin among `rows`, [S + 1] int64."""
        return torch.searchsorted(self.rows, cu_seqlens)

    def inputs(self, place: int) -> Tensor:
        """[n, K] of `rows`: x of the pair at ``place``."""
        return self.products.pairs[place][0][self.rows]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns, gradient [n, columns]) of `rows` by the products, float32 (float64 of float64 inputs)."""
        vocabulary = len(self.products.pairs[0][1])
        fits = _BLOCK_BYTES // (4 * max(1, len(self.rows)))
        width = max(1, fits // _COLUMNS) * _COLUMNS
        labels, lse, by = (t[self.rows] for t in (self.labels, self.lse, self.by))
        for start in range(0, vocabulary, width):
            columns = slice(start, min(start + width, vocabulary))
            yield columns, self._block(columns, labels, lse, by)

    def _block(self, columns: slice, labels: Tensor, lse: Tensor, by: Tensor) -> Tensor:
        pairs = tuple((x, weight[columns]) for x, weight in self.products.pairs)
        bias = None if self.products.bias is None else self.products.bias[columns]
        x = Products(pairs, bias).logits(self.rows, self.scale, half=False)
        if self.softcap:
            x = torch.tanh_(x.div_(self.softcap))
            slope = 1.0 - x.square()
            x = x.mul_(self.softcap)
        delta = torch.exp_(x.sub_(lse[:, None].to(x.dtype)))
        here = (labels >= columns.start) & (labels < columns.stop)
        place = (labels - columns.start).clamp(0, delta.shape[1] - 1)
        delta.scatter_add_(1, place[:, None], -here.to(delta.dtype)[:, None])
        if self.softcap:
            delta *= slope
        return delta.mul_((by * self.scale)[:, None].to(delta.dtype))
