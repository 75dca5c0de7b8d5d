"""What the host knows of tensors on a device, so that it need not wait for the device to read it back.

A batch is collated on the host, so where its samples begin and how many of its tokens count is known there before it is
moved. The knowledge goes with the tensor object and ends with it.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

IGNORED = -100
_values = cast("MutableMapping[Tensor, list[int]]", WeakTensorKeyDictionary())
_counts = cast("MutableMapping[Tensor, int]", WeakTensorKeyDictionary())


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``, by a copy that the host does not wait for."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def with_values(tensor: Tensor, values: Sequence[int]) -> Tensor:
    """``tensor``, of which the host knows that it holds ``values``."""
    _values[tensor] = list(values)
    return tensor


def values_of(tensor: Tensor) -> list[int]:
    """The integers in a tensor [n]; waits for its device only where the host does not know them."""
    known = _values.get(tensor)
    return cast("list[int]", tensor.tolist()) if known is None else known


def with_count(labels: Tensor, count: int) -> Tensor:
    """``labels`` [N], of which the host knows that ``count`` are not `IGNORED`."""
    _counts[labels] = count
    return labels


def counted_positions(labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Where the labels [N] are not ``ignore_index``: int64 [n], ascending; waits where the host does not know n."""
    count = _counts.get(labels) if ignore_index == IGNORED else None
    if count is None:
        return (labels != ignore_index).nonzero()[:, 0]
    return torch.argsort((labels == ignore_index).to(torch.int8), stable=True)[:count]
