"""Models that ZeRO-3 is not to partition: those that are whole on each rank, and those without values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def whole() -> Iterator[None]:
    """Inside, transformers partitions no model that it makes or loads."""
    from transformers.integrations import deepspeed as hf

    alive = hf._hf_deepspeed_config_weak_ref
    hf.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf._hf_deepspeed_config_weak_ref = alive


@contextmanager
def without_values() -> Iterator[None]:
    """Inside, models are made on the meta device: names, shapes and classes alone."""
    with whole(), torch.device("meta"):
        yield
