"""Schedules (which step belongs to which phase) and plans (which samples a phase trains on).

Everything here is a pure function of its arguments: the same for every world size, rank and resume.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dataflex.utils.errors import UserError

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
Numbers = TypeVar("Numbers", np.int64, np.float64)


def generator(seed: int, *purpose: object) -> np.random.Generator:
    """A random generator for one purpose, for example ``generator(seed, "order", phase)``."""
    digest = hashlib.blake2b(repr((int(seed), *purpose)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


@dataclass(frozen=True)
class Phase:
    """The optimizer steps ``start < step <= start + steps``.

    ``decides``: a component is asked before the first of them. ``decision`` counts decisions from 1; 0 in the
    warm-up. A phase that does not decide but has a decision > 0 goes on with that decision.
    """

    index: int
    start: int
    steps: int
    decision: int
    decides: bool

    @property
    def end(self) -> int:
        return self.start + self.steps


@dataclass(frozen=True)
class Schedule:
    """Phases in order, without gaps; `total_steps` optimizer steps in all."""

    phases: tuple[Phase, ...]

    @property
    def total_steps(self) -> int:
        return self.phases[-1].end

    @property
    def decisions(self) -> int:
        return sum(p.decides for p in self.phases)

    def phase_at(self, step: int) -> Phase:
        """The phase of the step that follows ``step`` finished ones."""
        assert step < self.total_steps, f"step {step} is past the end of the schedule ({self.total_steps})"
        return self.phases[bisect_right(self.phases, step, key=lambda phase: phase.end)]


def steps_of_epochs(epochs: float, rows: int, global_batch: int) -> int:
    """Steps of so many epochs as transformers counts them: an epoch is a whole number of steps, and what is left of a
    step after the last epoch is a step, too. At least 1.

    Every step is of a whole global batch, so that the last one of an epoch goes on with the next epoch's first rows.
    """
    return max(1, math.ceil(epochs * math.ceil(rows / global_batch)))


def decision_schedule(
    *, warmup_step: int, update_step: int, update_times: int, train_step: int | None, epoch_steps: int
) -> Schedule:
    """The schedule of selection and mixing (design section 4).

    Total steps: ``train_step`` if set, else ``warmup_step + update_step * update_times``, else (with
    ``update_times == -1``) ``epoch_steps``. What ``train_step`` leaves after the last decision goes on with
    that decision, in further phases of ``update_step``.
    """
    if update_step <= 0:
        raise UserError(f"update_step: must be > 0, got {update_step}")
    if train_step is not None:
        total = train_step
    elif update_times >= 0:
        total = warmup_step + update_step * update_times
    else:
        total = epoch_steps
    phases = [Phase(0, 0, min(warmup_step, total), 0, False)] if warmup_step else []
    at, decision = min(warmup_step, total), 0
    while at < total:
        decides = update_times < 0 or decision < update_times
        decision += decides
        steps = min(update_step, total - at)
        phases.append(Phase(len(phases), at, steps, decision, decides))
        at += steps
    if not phases:
        raise UserError("train_step: the schedule has no steps")
    return Schedule(tuple(phases))


def epoch_schedule(total_steps: int, epoch_steps: int) -> Schedule:
    """Phases of one epoch each, nothing to decide: static training and weighting."""
    starts = range(0, total_steps, epoch_steps)
    return Schedule(tuple(Phase(i, s, min(epoch_steps, total_steps - s), 0, False) for i, s in enumerate(starts)))


@dataclass(frozen=True, eq=False)
class Plan:
    """The ordered sample ids of a phase, int64 [n], with the probability of each draw, float64 [n].

    starts: where each row of a batch begins in them and the last one ends, int64 [rows + 1], strictly ascending; None:
    every sample has a row of its own.
    """

    sample_ids: Ids
    probabilities: Floats
    starts: Ids | None = None

    def __post_init__(self) -> None:
        assert self.sample_ids.dtype == np.int64, self.sample_ids.dtype
        assert self.sample_ids.shape == self.probabilities.shape
        assert self.sample_ids.ndim == 1
        assert self.starts is None or (self.starts[0], self.starts[-1]) == (0, len(self.sample_ids))

    @property
    def rows(self) -> int:
        return len(self.sample_ids) if self.starts is None else len(self.starts) - 1

    def step(self, index: int, global_batch: int) -> tuple[Ids, Floats]:
        """Ids and probabilities of the phase's ``index``-th global batch, which is of so many rows."""
        assert (index + 1) * global_batch <= self.rows, "the plan is shorter than its phase"
        return self.part(index * global_batch, (index + 1) * global_batch)

    def part(self, first: int, end: int) -> tuple[Ids, Floats]:
        """Ids and probabilities of the rows from ``first`` to before ``end``."""
        window = slice(first, end) if self.starts is None else slice(*self.starts[[first, end]])
        return self.sample_ids[window], self.probabilities[window]

    def take(self, rows: Ids) -> Plan:
        """A plan of these rows. rows: their numbers, int64 [m], any number of times each."""
        if self.starts is None:
            return Plan(self.sample_ids[rows], self.probabilities[rows])
        sizes = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        places = np.arange(starts[-1]) + np.repeat(self.starts[rows] - starts[:-1], sizes)
        return Plan(self.sample_ids[places], self.probabilities[places], starts)


GROUPED_BATCHES = 50


def group_by_length(plan: Plan, lengths: NDArray[np.integer[Any]], global_batch: int, seed: int, phase: int) -> Plan:
    """The plan in an order that puts samples of about the same length into one global batch.

    ``lengths``: [pool]. Runs of 50 global batches are sorted by length and cut into global batches again, whose
    order is shuffled; so a sample stays within 50 steps of its place, and ties keep their order.
    """
    assert plan.starts is None, "packed rows are of about the same length anyway"
    count, run_size = len(plan.sample_ids), GROUPED_BATCHES * global_batch
    assert count % global_batch == 0, "the plan holds whole global batches"
    draw = generator(seed, "group by length", phase)
    order: list[Ids] = []
    for start in range(0, count, run_size):
        ids = plan.sample_ids[start : start + run_size]
        batches = np.argsort(lengths[ids], kind="stable").reshape(-1, global_batch)
        order.append(start + draw.permutation(batches).reshape(-1))
    whole = np.concatenate(order) if order else np.empty(0, dtype=np.int64)
    return Plan(plan.sample_ids[whole], plan.probabilities[whole])


def rank_slices(ids: NDArray[Numbers], *, micro_batch: int, rank: int, world_size: int) -> list[NDArray[Numbers]]:
    """Split the rows of one global batch (a number for each) into this rank's micro-batches.

    Micro-step k of all ranks together takes the k-th run of ``micro_batch * world_size`` rows, so that the
    global micro-batch is the same for every split of its size into ranks.
    """
    rows = ids.reshape(-1, world_size, micro_batch)
    return [row[rank] for row in rows]


def epoch_stream(size: int, seed: int, purpose: str, start: int, count: int) -> Ids:
    """Positions ``start .. start + count`` of an endless concatenation of permutations of ``range(size)``.

    Every sample comes once before any comes twice. Memory is one permutation.
    """
    parts: list[Ids] = []
    at = start
    while at < start + count:
        epoch, offset = divmod(at, size)
        order = generator(seed, purpose, epoch).permutation(size).astype(np.int64)
        take = min(size - offset, start + count - at)
        parts.append(order[offset : offset + take])
        at += take
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _whole_numbers(ids: Any, source: str) -> Ids:
    """A flat list, array or CPU tensor of whole numbers as int64 [n]; not a mask."""
    try:
        array = np.asarray(ids)
    except (TypeError, ValueError) as exc:
        raise UserError(f"{source}: must return a flat list of sample ids (int), got {type(ids).__name__}") from exc
    numbers = array.dtype.kind in "iuf"
    if not numbers or array.ndim != 1 or (np.trunc(array) != array).any() or not np.isfinite(array).all():
        got = f"{array.dtype} {array.shape}" if array.dtype.kind in "iufb" and array.ndim else type(ids).__name__
        raise UserError(f"{source}: must return a flat list of sample ids (int), got {got}")
    return array.astype(np.int64)


def check_sample_ids(ids: Any, *, pool_size: int, asked: int, replacement: bool, source: str) -> Ids:
    """Return a selector's answer as int64 [asked]; ValueError for wrong counts, ids out of range, repeats."""
    whole = _whole_numbers(ids, source)
    if len(whole) != asked:
        raise UserError(f"{source}: asked for {asked} sample ids, got {len(whole)}")
    bad = np.flatnonzero((whole < 0) | (whole >= pool_size))
    if bad.size:
        raise UserError(
            f"{source}: sample id {whole[bad[0]]} at position {bad[0]} is out of range; valid: 0 to {pool_size - 1}"
        )
    if not replacement and len(np.unique(whole)) != asked:
        values, counts = np.unique(whole, return_counts=True)
        raise UserError(
            f"{source}: sample id {values[counts.argmax()]} is returned {counts.max()} times; "
            "set `replacement = True` on the selector if that is meant"
        )
    return whole


def check_proportions(proportions: Any, *, names: Sequence[str], source: str) -> Floats:
    """Return proportions normalised to sum 1; ValueError for wrong length, negative, NaN or all-zero ones."""
    try:
        array = np.asarray(proportions, dtype=np.float64)
    except (TypeError, ValueError) as exc:
        raise UserError(f"{source}: must return a flat list of numbers, got {proportions!r}") from exc
    if array.shape != (len(names),):
        raise UserError(
            f"{source}: needs {len(names)} proportions ({', '.join(names)}), got shape {tuple(array.shape)}"
        )
    for name, value in zip(names, array, strict=True):
        if not np.isfinite(value) or value < 0:
            raise UserError(f"{source}: proportion of '{name}' is {value}; valid: finite and >= 0")
    if array.sum() <= 0:
        raise UserError(f"{source}: proportions are all zero")
    normalised: Floats = array / array.sum()
    return normalised


def largest_remainder(proportions: Floats, total: int) -> Ids:
    """Integer counts that sum to ``total``, each within 1 of ``proportions * total``."""
    exact = proportions / proportions.sum() * total
    counts: Ids = np.floor(exact).astype(np.int64)
    rest = int(total - counts.sum())
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[:rest]] += 1
    return counts
