"""Weighted sampling: every draw of static training in proportion to the samples' weights."""

from __future__ import annotations

import hashlib
from functools import partial

import numpy as np

from dataflex.core.context import Run
from dataflex.core.hook import Planner
from dataflex.core.packing import drawn
from dataflex.core.plan import Floats, Phase, Plan, generator
from dataflex.core.sampling import distinct_draw, weighted_draw
from dataflex.utils.errors import UserError


class WeightedPlanner(Planner):
    """Draws each phase anew. probabilities: float64 [pool] of sum 1.

    With replacement a plan's probability is that of one draw. Without, a phase's samples are distinct, in random
    order, and its probability is the sample's chance to be in the phase / the samples of the phase: dividing by it
    is unbiased in both. Packed, a phase has as many samples as fill its rows.
    """

    decides = False

    def __init__(self, probabilities: Floats, replacement: bool) -> None:
        self.probabilities = probabilities
        self.replacement = replacement

    def on_train_start(self, run: Run) -> None:
        """UserError where a pass without replacement asks for more samples than can be drawn."""
        available, rows = np.flatnonzero(self.probabilities > 0), "samples"
        asked, given = max(phase.steps for phase in run.schedule.phases) * run.global_batch, len(available)
        if run.packing is not None:
            rows, given = "packs", run.packing.packed(Plan(available, self.probabilities[available])).rows
        if not self.replacement and asked > given:
            raise UserError(
                f"sampling_replacement: false: a pass draws {asked} distinct {rows} (sampling_samples in whole "
                f"global batches), the pool has {given} with a weight > 0; lower sampling_samples"
            )

    def plan(self, run: Run, phase: Phase) -> Plan:
        most = None if self.replacement else int((self.probabilities > 0).sum())
        return drawn(run.packing, partial(self._draw, run.seed, phase.index), phase.steps * run.global_batch, most)

    def _draw(self, seed: int, phase: int, count: int) -> Plan:
        draw = generator(seed, "weighted sampling", phase)
        if self.replacement:
            ids = weighted_draw(self.probabilities, count, replacement=True, draw=draw)
            return Plan(ids, self.probabilities[ids])
        ids, included = distinct_draw(self.probabilities, count, draw)
        order = draw.permutation(count)
        return Plan(ids[order], included[order] / count)

    @property
    def identity(self) -> str:
        how = "with" if self.replacement else "without"
        digest = hashlib.sha256(np.ascontiguousarray(self.probabilities).tobytes()).hexdigest()[:16]
        return f"WeightedPlanner {how} replacement {digest}"
