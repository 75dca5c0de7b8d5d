"""Samples as segments of a row of tokens: sample s is tokens cu_seqlens[s] to cu_seqlens[s + 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def check_segments(cu_seqlens: Tensor, tokens: int, samples: int | None = None) -> None:
    """ValueError unless ``cu_seqlens`` is int64 [S + 1], S = ``samples`` where given, and rises from 0 to ``tokens``.

    Values are looked at only where that needs no wait for a device.
    """
    wrong_size = samples is not None and cu_seqlens.shape != (samples + 1,)
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype is not torch.int64 or wrong_size:
        size = "S + 1" if samples is None else samples + 1
        raise ValueError(f"cu_seqlens: expected int64 [{size}], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device.type != "cpu":
        return
    bounds: list[int] = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens: expected to rise from 0 to {tokens}, got {bounds}")
