"""The products that a linear head's logits are, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_SLICE_BYTES = 32 << 20


class Products(NamedTuple):
    """What the logits are made of: pairs (x [N, K], W [V, K]) and bias [V]."""

    pairs: tuple[tuple[Tensor, Tensor], ...]
    bias: Tensor | None = None

    def flat(self) -> tuple[Tensor | None, ...]:
        return self.bias, *(t for pair in self.pairs for t in pair)

    @staticmethod
    def of(bias: Tensor | None, *flat: Tensor) -> Products:
        return Products(tuple(zip(flat[0::2], flat[1::2], strict=True)), bias)

    def logits(self, rows: Tensor, scale: float, half: bool) -> Tensor:
        """[n, V] of the tokens at ``rows``, summed and kept in float32 (float64 of float64 inputs) unless ``half``."""
        (x, weight), *others = self.pairs
        logits = _product(x[rows], weight, half)
        for x, weight in others:
            logits += _product(x[rows], weight, half)
        if self.bias is not None:
            logits += self.bias
        return logits if scale == 1.0 else logits.mul_(scale)


def _product(x: Tensor, weight: Tensor, half: bool) -> Tensor:
    """[n, V] x @ weight.T."""
    if half or x.dtype in (torch.float32, torch.float64):
        return x @ weight.T
    if x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    out = x.new_empty(len(x), len(weight), dtype=torch.float32)
    wide = x.float()
    for part in _slices(weight):
        out[:, part] = wide @ weight[part].float().T
    return out


def _times_weight(grad: Tensor, weight: Tensor) -> Tensor:
    """[n, K] grad [n, V] @ weight, in the weight's dtype."""
    if weight.is_cuda or weight.dtype == grad.dtype:
        return grad.to(weight.dtype) @ weight
    out = grad.new_zeros(len(grad), weight.shape[1])
    for part in _slices(weight):
        out.addmm_(grad[:, part], weight[part].float())
    return out.to(weight.dtype)


def _add_outer_(out: Tensor, grad: Tensor, x: Tensor) -> None:
    """out [V, K] += grad [n, V].T @ x [n, K], the sum in out's dtype."""
    if grad.dtype == out.dtype == x.dtype:
        out.addmm_(grad.T, x)
    elif x.is_cuda:
        out += torch.mm(grad.to(x.dtype).T, x, out_dtype=out.dtype)
    elif grad.dtype == out.dtype:
        out.addmm_(grad.T, x.to(out.dtype))
    else:
        for part in _slices(out):
            out[part] += grad[:, part].T @ x


def _slices(weight: Tensor) -> Iterator[slice]:
    """Rows of the weight whose float32 copy is small: CPUs multiply that faster and more exactly."""
    rows = max(1, _SLICE_BYTES // (4 * weight.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(weight), rows))


class Gradients:
    """Those of the bias and of each x and W that wants one; of W and bias summed in float32."""

    def __init__(self, products: Products, needs: tuple[bool, ...], scale: float) -> None:
        def zeros(like: Tensor, wide: bool) -> Tensor:
            exact = torch.float64 if like.dtype is torch.float64 else torch.float32
            return torch.zeros_like(like, dtype=exact if wide else like.dtype)

        self.products, self.scale = products, scale
        flat = products.flat()
        wide = [place % 2 == 0 for place in range(len(flat))]  # bias, x, W, x, W, ...
        self.sums = [
            zeros(t, w) if need and t is not None else None for t, need, w in zip(flat, needs, wide, strict=True)
        ]

    def add(self, rows: Tensor, grad: Tensor) -> None:
        """What the tokens at ``rows`` contribute; grad: [n, V] by their logits, changed in place."""
        if self.scale != 1.0:
            grad.mul_(self.scale)
        bias, *rest = self.sums
        if bias is not None:
            bias += grad.sum(0, dtype=bias.dtype)
        for (x, weight), by_x, by_weight in zip(self.products.pairs, rest[0::2], rest[1::2], strict=True):
            if by_x is not None:
                by_x[rows] = _times_weight(grad, weight)
            if by_weight is not None:
                _add_outer_(by_weight, grad, x[rows])

    def take(self) -> list[Tensor | None]:
        """In the dtypes of the inputs."""
        flat = self.products.flat()
        return [None if s is None or t is None else s.to(t.dtype) for s, t in zip(self.sums, flat, strict=True)]
