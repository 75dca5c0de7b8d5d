"""From a plan to the micro-batches of this rank: read, collated, on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from dataflex.core.context import Run
from dataflex.core.plan import Floats, Ids, Plan, rank_slices
from dataflex.core.weights import NO_WEIGHTS, StaticWeights
from dataflex.forward.split import split_batch
from dataflex.ops import shift_labels
from dataflex.ops.known import moved
from dataflex.utils.errors import UserError
from dataflex.utils.stopping import leave_signals_to_parent


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward's worth of this rank's samples.

    inputs: the model's keyword arguments. labels: [N] int64, shifted; raw_labels: [B, T] as collated.
    cu_seqlens: [S + 1] int64. counts: [S] int64, counted tokens. sample_ids: [S] int64. probabilities: [S]
    float64, of the draws. weights: [S] float32 on the device, the samples' own weights, or None. token_weights: [N]
    float32, of the labels, or None.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    raw_labels: Tensor
    cu_seqlens: Tensor
    counts: Tensor
    sample_ids: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    weights: Tensor | None
    token_weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StepBatch:
    """This rank's GAS micro-batches of one optimizer step, and the step's global batch of ids [n]."""

    micro_batches: list[MicroBatch]
    sample_ids: NDArray[np.int64]


class BatchSource:
    """Loads the micro-batches of a plan: reads samples, collates them and moves them to the device.

    weights: the samples' own.
    """

    def __init__(
        self,
        run: Run,
        collator: Callable[[list[Any]], dict[str, Any]],
        device: torch.device,
        workers: int = 0,
        weights: StaticWeights = NO_WEIGHTS,
    ) -> None:
        self.run = run
        self.collator = collator
        self.device = device
        self.workers = workers
        self.weights = weights

    def batches(self, plan: Plan, first: int, steps: int) -> Iterator[StepBatch]:
        """The phase's global batches from number ``first`` to ``steps``."""
        wanted = _MicroBatchIds(self.run, plan, first, steps)
        loader = iter(
            DataLoader(
                self.run.pool,
                batch_sampler=wanted,  # type: ignore[arg-type]
                collate_fn=_Collate(self.collator),
                num_workers=self.workers,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),
                worker_init_fn=leave_signals_to_parent,
            )
        )
        for index in range(first, steps):
            ids, _ = plan.step(index, self.run.global_batch)
            parts = zip(islice(loader, self.run.accumulation), wanted.of_rank(index), strict=True)
            yield StepBatch([self._micro(batch, *part) for batch, part in parts], ids)

    def _micro(self, collated: dict[str, Any], ids: NDArray[np.int64], draws: NDArray[np.float64]) -> MicroBatch:
        of_tokens = collated.get("token_weight")
        inputs, labels, raw_labels, cu_seqlens = split_batch(collated, self.device)
        if len(cu_seqlens) != len(ids) + 1:
            raise UserError(
                f"data_collator: got {len(ids)} samples, returned {len(cu_seqlens) - 1}; it must keep one row "
                "or one cu_seqlens segment per sample, in order"
            )
        counted = (labels != -100).to(torch.float32)
        counts = torch.segment_reduce(counted, "sum", lengths=cu_seqlens.diff(), unsafe=True).to(torch.int64)
        static = self.weights.of(self.run.pool.weight_rows(ids), draws, self.run.pool.size)
        weights = None if static is None else moved(torch.from_numpy(static).to(torch.float32), self.device)
        shifted = None if of_tokens is None else shift_labels(moved(of_tokens.to(torch.float32), self.device), 0)
        return MicroBatch(inputs, labels, raw_labels, cu_seqlens, counts, ids, draws, weights, shifted)


class _MicroBatchIds:
    """The ids of this rank's micro-batches, list by list, for a DataLoader; nothing is held at once."""

    def __init__(self, run: Run, plan: Plan, first: int, steps: int) -> None:
        self.run, self.plan, self.first, self.steps = run, plan, first, steps

    def __len__(self) -> int:
        return (self.steps - self.first) * self.run.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for index in range(self.first, self.steps):
            for ids, _ in self.of_rank(index):
                yield ids.tolist()

    def of_rank(self, index: int) -> list[tuple[Ids, Floats]]:
        """Ids and probabilities of this rank's part of each micro-step of the phase's ``index``-th global batch."""
        run = self.run
        rows = index * run.global_batch + np.arange(run.global_batch)
        parts = rank_slices(rows, micro_batch=run.micro_batch, rank=run.rank, world_size=run.world_size)
        return [self.plan.part(part[0], part[-1] + 1) for part in parts]


class _Collate:
    """Collates samples and sees that the weights of their tokens come through, in a loader worker or not."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        batch = self.collator(samples)
        if "token_weight" in samples[0] and "token_weight" not in batch:
            raise UserError("data_collator: the samples have token_weight, the batch has none; add it, [B, T]")
        return batch
