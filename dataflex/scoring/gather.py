"""Results of all ranks' scoring calls, put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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


def all_parts(tensor: torch.Tensor) -> torch.Tensor:
    """[world, ...]: the ranks' tensors of the same shape, one below the other."""
    return dist.all_gather(tensor[None])


@contextmanager
def whole(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 has taken apart hold their values on every rank.

    Those that a backward has left whole stay so: DeepSpeed refuses to take them apart before the pass ends.
    """
    from deepspeed import zero
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    apart = [p for p in parameters if getattr(p, "ds_status", ZeroParamStatus.AVAILABLE) != ZeroParamStatus.AVAILABLE]
    with zero.GatheredParameters(apart, enabled=bool(apart)):
        yield
