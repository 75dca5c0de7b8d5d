"""The CUDA kernels on CPU tensors, in a given order of threads: for the tests of every op family.

with emulated("random", seed=2):
    result = per_sample_loss(...)        # on CPU tensors, by csrc/kernels
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

import pytest

from dataflex.ops.native import _ext

ORDERS: tuple[tuple[str, int], ...] = (("forward", 1), ("reverse", 1), ("random", 1), ("random", 2))
if os.environ.get("DATAFLEX_SANITIZE") == "thread":
    ORDERS = ORDERS[:1]  # TSan looks at what is ordered, not at what happened first
MOST_SHARED = 232448  # bytes a block can have on an H100
NAN_POISON, BIG_POISON = 0xFF, 0x7F  # the second: floats of 3.4e38, integers of 2139062143


@contextlib.contextmanager
def emulated(
    order: str = "forward", seed: int = 1, poison: int = NAN_POISON, shared: int = MOST_SHARED
) -> Iterator[None]:
    """Inside, the public ops run the emulated kernels, on a device whose blocks can have ``shared`` bytes of shared
    memory. Skips where there is no C++ compiler."""
    result = _ext.load("emu")
    if isinstance(result, _ext.Unavailable):
        if result.reason.startswith("no C++ compiler"):
            pytest.skip(result.reason)
        raise AssertionError(result.reason)
    library = ctypes.CDLL(str(result.path))
    number = ("forward", "reverse", "random").index(order)
    library.dataflex_emu_configure(ctypes.c_int(number), ctypes.c_uint64(seed), ctypes.c_int(poison))
    library.dataflex_emu_limit_shared(ctypes.c_size_t(shared))
    try:
        with _ext.emulated():
            yield
    finally:
        library.dataflex_emu_limit_shared(ctypes.c_size_t(MOST_SHARED))
