"""How the op benchmarks measure: variants in turn, medians and quartiles, peak memory, what the machine can do."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Row = dict[str, Any]
Variant = Callable[[], Any]
# One call, or several on different operands that take turns.
Variants = Mapping[str, Variant | Sequence[Variant]]
_SLOW_ROUNDS = 3
_FLUSHED_BYTES = 512 << 20  # more than any L2 cache; writing it also lets the launches that follow queue up


@dataclass(frozen=True)
class Bench:
    """Where and how long to measure. smoke: tiny shapes and two rounds, to see that everything runs."""

    device: torch.device
    rounds: int = 15
    smoke: bool = False

    def times(
        self, variants: Variants, slow: Collection[str] = (), before: Mapping[str, Variant] | None = None
    ) -> dict[str, list[float]]:
        """Milliseconds of each variant, ``rounds`` times in turn, after two calls that do not count.

        On a GPU by events, the L2 cache flushed before each. Those in ``slow`` run three times, after one call.
        before: by name, what is called before each call of a variant and not timed.
        """
        calls = {name: (v,) if callable(v) else tuple(v) for name, v in variants.items()}
        before = before or {}
        for name, each in calls.items():
            for variant in each[:1] if name in slow else (each * 2)[: max(2, len(each))]:
                before.get(name, _nothing)()
                variant()
        taken: dict[str, list[float]] = {name: [] for name in variants}
        names = list(variants)
        for turn in range(2 if self.smoke else self.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if name in slow and turn >= _SLOW_ROUNDS:
                    continue
                before.get(name, _nothing)()
                taken[name].append(self._time(calls[name][turn % len(calls[name])]))
        return taken

    def _time(self, variant: Variant) -> float:
        self._wait()
        if self.device.type != "cuda":
            started = time.perf_counter()
            variant()
            return 1e3 * (time.perf_counter() - started)
        torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=self.device).zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        variant()
        stop.record()
        self._wait()
        return float(start.elapsed_time(stop))

    def peak_mib(self, variant: Variant) -> float:
        """Memory that a call needs above what is allocated before it."""
        self._wait()
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            variant()
            self._wait()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        if not Path("/proc/self/clear_refs").exists():
            return float("nan")
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and kept would hide what the call needs
        Path("/proc/self/clear_refs").write_text("5")
        before_kib = _memory_kib("VmRSS")
        variant()
        return max(0, _memory_kib("VmHWM") - before_kib) / 2**10

    def allocated_mib(self, variant: Variant) -> float:
        """The most that PyTorch had allocated during a call, above what it had before."""
        if self.device.type == "cuda":
            return self.peak_mib(variant)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
            variant()
        assert taken.profiler is not None and taken.profiler.kineto_results is not None
        changes = [e for e in taken.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes.sort(key=lambda event: event.start_ns())
        return max(accumulate((event.nbytes() for event in changes), initial=0)) / 2**20

    def rows(
        self,
        op: str,
        shape: str,
        variants: Variants,
        *,
        against: str,
        floor_ms: float,
        floor: str,
        errors: Mapping[str, float],
        slow: Collection[str] = (),
        before: Mapping[str, Variant] | None = None,
    ) -> list[Row]:
        """A row for each variant. against: the variant that the speedup is relative to, round by round.

        floor: what bounds it. slow, before: see `times`.

        errors: relative errors, checked by the caller before the timing.
        """
        taken = self.times(variants, slow, before)
        rows = []
        for name, times in taken.items():
            low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
            ratio = statistics.median(b / a for a, b in zip(times, taken[against], strict=False))
            variant = variants[name]
            first = variant if callable(variant) else variant[0]
            rows.append(
                {
                    "op": op,
                    "shape": shape,
                    "implementation": name,
                    "median_ms": round(median, 4),
                    "quartiles_ms": f"{low:.4f}-{high:.4f}",
                    "speedup": round(ratio, 2),
                    "against": against,
                    "floor_ms": round(floor_ms, 4),
                    "of_floor": round(floor_ms / median, 3),
                    "floor": floor,
                    "peak_mib": round(self.peak_mib(first), 1),
                    "error": f"{errors.get(name, float('nan')):.1e}",
                }
            )
        return rows

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def bandwidth(self) -> dict[str, float]:
        """Measured bytes per millisecond of reading (a sum) and of copying (bytes read and written) a large array."""
        numbers = (1 if self.smoke else 64) << 20
        source, target = (torch.randn(numbers, device=self.device) for _ in range(2))
        taken = self.times({"read": source.sum, "copy": lambda: target.copy_(source)})
        return {name: 4 * numbers * (1 + (name == "copy")) / min(times) for name, times in taken.items()}

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """Measured operations per millisecond of a large square product."""
        size = 256 if self.smoke else 8192 if self.device.type == "cuda" else 1536
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        return 2 * size**3 / min(self.times({"product": lambda: a @ b})["product"])


def _nothing() -> None:
    """Before a variant that needs nothing."""


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))


def machine(device: torch.device) -> Row:
    """Hardware and versions, for every row."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else _cpu_name()
    threads = "" if cuda else f", {torch.get_num_threads()} threads"
    found = {package: _version(package) for package in ("liger-kernel", "cut-cross-entropy", "traker", "fast-jl")}
    libraries = " ".join(f"{package}={number}" for package, number in found.items() if number)
    return {
        "hardware": f"{name}{threads}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "with": libraries,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _memory_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return f"{name}, {os.cpu_count()} cores"
