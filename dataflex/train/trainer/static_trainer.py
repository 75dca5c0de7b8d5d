"""Static training: every sample, or every pack of them, once per epoch, in random order."""

from __future__ import annotations

import numpy as np

from dataflex.core.context import Run
from dataflex.core.hook import Planner
from dataflex.core.plan import Phase, Plan, epoch_stream


def uniform_plan(run: Run, phase: Phase, purpose: str) -> Plan:
    """The phase's part of the endless stream of permutations of the pool."""
    start, count = phase.start * run.global_batch, phase.steps * run.global_batch
    if run.packing is not None:
        return run.packing.pool.take(epoch_stream(run.packing.pool.rows, run.seed, purpose, start, count))
    ids = epoch_stream(len(run.pool), run.seed, purpose, start, count)
    return Plan(ids, np.full(count, 1.0 / len(run.pool)))


class StaticPlanner(Planner):
    """Goes over the pool epoch by epoch; nothing is decided."""

    decides = False

    def plan(self, run: Run, phase: Phase) -> Plan:
        return uniform_plan(run, phase, "epoch")
