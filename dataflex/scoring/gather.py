"""Results of all ranks' scoring calls, put together."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.utils import dist


def merge(values: NDArray[np.float32], device: torch.device) -> NDArray[np.float32]:
    """Sum arrays in which every rank filled its own rows and left the rest zero; the same shape on each."""
    if dist.world_size() == 1:
        return values
    return dist.all_reduce(torch.from_numpy(values).to(device)).cpu().numpy()


def sum_over_ranks(tensor: torch.Tensor) -> None:
    """Add up the ranks' tensors of the same shape, in place."""
    dist.all_reduce(tensor)
