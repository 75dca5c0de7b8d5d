"""How far a scoring pass is: a bar on a terminal, plain lines elsewhere; after the first batch, how long it will be."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch

from dataflex.utils import dist
from dataflex.utils.logging import logger

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Context manager. what: who scores, for the screen. samples, tokens: of the whole pass, all ranks.

    Rank 0 counts its own batches and takes the other ranks for as fast.
    """

    def __init__(self, what: str, samples: int, tokens: int) -> None:
        self.what, self.samples, self.tokens = what, samples, tokens
        self.done_samples = self.done_tokens = 0
        self.started = self.last_line = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        self.started = self.last_line = time.monotonic()
        if dist.is_main() and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.samples, unit=" samples", desc=self.what, leave=False, dynamic_ncols=True)
        return self

    def batch(self, samples: int, tokens: int) -> None:
        """Note a batch of this rank."""
        first = self.done_samples == 0
        before = self.done_samples
        self.done_samples = min(self.samples, self.done_samples + samples * dist.world_size())
        self.done_tokens = min(self.tokens, self.done_tokens + tokens * dist.world_size())
        if self.bar is not None:
            self.bar.update(self.done_samples - before)
            self.bar.set_postfix_str(f"{self._rate(self.done_tokens):,.0f} tokens/s")
        now = time.monotonic()
        if first:
            logger.info(f"{self.what}: about {self._left()} to go, as of the first batch; memory {memory_in_use()}")
        elif self.bar is None and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            logger.info(
                f"{self.what}: {self.done_samples:,} of {self.samples:,} samples, {self._rates()}, {self._left()} left"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        if kind is None and self.samples:
            self.done_samples, self.done_tokens = self.samples, self.tokens
            seconds = time.monotonic() - self.started
            logger.info(
                f"{self.what}: {self.samples:,} samples, {self.tokens:,} tokens in {seconds:.2f} s ({self._rates()})"
            )

    def _rate(self, done: int) -> float:
        return done / max(time.monotonic() - self.started, 1e-9)

    def _rates(self) -> str:
        return f"{self._rate(self.done_samples):,.1f} samples/s, {self._rate(self.done_tokens):,.0f} tokens/s"

    def _left(self) -> str:
        return duration((self.tokens - self.done_tokens) / max(self._rate(self.done_tokens), 1e-9))


def duration(seconds: float) -> str:
    """``1:02:03`` as hours, minutes, seconds; days in front where there are any."""
    return str(timedelta(seconds=round(seconds)))


def peak_memory_mib() -> float:
    """This process's highest memory so far: the device's, or on a CPU the process's own."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def memory_in_use() -> str:
    """`peak_memory_mib` for people."""
    return f"{peak_memory_mib():,.0f} MiB" + (" of the device" if torch.cuda.is_available() else "")


def counted(count: int, noun: str, plural: str = "s") -> str:
    """``1 sample``, ``1,200 samples``."""
    return f"{count:,} {noun}" + (plural if count != 1 else "")


def size(count_bytes: float) -> str:
    """``1.5 GiB``: bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count_bytes < 1024:
            return f"{count_bytes:,.0f} B" if unit == "B" else f"{count_bytes:,.1f} {unit}"
        count_bytes /= 1024
    return f"{count_bytes:,.1f} TiB"
