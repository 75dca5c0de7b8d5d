"""How a run splits its global batch into processes and micro-batches, and which other split may go on with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dataflex.core.hook import Hook
from dataflex.utils.errors import UserError, shown

_NUMBERS = ("micro_batch", "gradient_accumulation", "world_size")
_GROUPS = ["", "micro-batch", "global micro-batch"]


class Split(NamedTuple):
    """The factors of a global batch. compared: the largest of `Hook.compared` in the run."""

    micro_batch: int
    gradient_accumulation: int
    world_size: int
    compared: str = ""

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.gradient_accumulation * self.world_size

    def __str__(self) -> str:
        return f"{self.micro_batch} x {self.gradient_accumulation} x {self.world_size}"


def compared_by(hooks: Sequence[Hook]) -> str:
    """The widest group of samples whose losses one of ``hooks`` compares with one another."""
    return max((hook.compared for hook in hooks), key=_GROUPS.index)


def check_split(saved: dict[str, Any], now: Split, folder: Path) -> None:
    """UserError unless a run split as ``now`` trains as the one whose `identity` is ``saved`` would.

    The global batch must be the same, and so must be the groups of samples that the weighting compares.
    """
    for key in _NUMBERS:
        value = saved.get(key)
        if type(value) is not int or value < 1:
            raise UserError(f"{folder}: the checkpoint has {key} {shown(value, 200)}, expected a whole number >= 1")
    was = Split(*(saved[key] for key in _NUMBERS))
    rows = "packs" if saved.get("packing") else "samples"
    compared = max((str(saved.get("compared")), now.compared), key=lambda c: _GROUPS.index(c) if c in _GROUPS else -1)
    if now.global_batch != was.global_batch:
        raise UserError(
            f"{folder}: the checkpoint has a global batch of {was} = {was.global_batch} {rows} "
            "(per_device_train_batch_size x gradient_accumulation_steps x processes), this run has "
            f"{now} = {now.global_batch}; {_advice(was, now, compared)}"
        )
    if _group(was, compared) != _group(now, compared):
        raise UserError(
            f"{folder}: its weighting compares the samples of a {compared}, which has {_group(was, compared)} {rows} "
            f"in the checkpoint and {_group(now, compared)} in this run; {_advice(was, now, compared)}"
        )


def _group(split: Split, compared: str) -> int:
    """The samples, or packs, that are compared with one another; 0 where none are."""
    if not compared:
        return 0
    return split.micro_batch * (split.world_size if compared == "global micro-batch" else 1)


def _fitting(was: Split, world_size: int, wanted: int, compared: str) -> Split | None:
    """The split over ``world_size`` processes with the largest micro-batch up to ``wanted``; None where none fits."""
    sizes = [
        Split(micro, was.global_batch // (micro * world_size), world_size)
        for micro in range(1, was.global_batch // world_size + 1)
        if was.global_batch % (micro * world_size) == 0
    ]
    fits = [split for split in sizes if _group(split, compared) == _group(was, compared)]
    small = [split for split in fits if split.micro_batch <= wanted]
    return max(small or fits, key=lambda split: split.micro_batch, default=None)


def _advice(was: Split, now: Split, compared: str) -> str:
    fit = _fitting(was, now.world_size, max(was.micro_batch, now.micro_batch), compared)
    same = f"or go on with --num_processes {was.world_size}, per_device_train_batch_size: {was.micro_batch} and "
    same += f"gradient_accumulation_steps: {was.gradient_accumulation}"
    if fit is not None:
        return (
            f"with --num_processes {now.world_size} set per_device_train_batch_size: {fit.micro_batch} and "
            f"gradient_accumulation_steps: {fit.gradient_accumulation}, {same}"
        )
    counts = [n for n in range(1, was.global_batch + 1) if _fitting(was, n, was.micro_batch, compared) is not None]
    return f"--num_processes {now.world_size} does not fit; valid: {', '.join(map(str, counts))}; {same}"
