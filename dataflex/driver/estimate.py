"""What a run will cost, from a few timed batches: the lines of ``--dry-run``. Nothing is written."""

from __future__ import annotations

from typing import Any

from dataflex.data.pool import Pool
from dataflex.driver.setup import Inputs
from dataflex.engine.plugin import DataflexEngine
from dataflex.report.summary import packs_line
from dataflex.scoring.kept.probe import Probe, time_batches
from dataflex.scoring.kept.sharded import ScoringPasses
from dataflex.scoring.progress import duration, memory_in_use, size
from dataflex.train.selector.target_selector import TargetSelector
from dataflex.train.trainer.select_trainer import SelectPlanner
from dataflex.train.trainer.without_model import WithoutModel
from dataflex.utils.logging import logger


def estimate(inputs: Inputs, engine: DataflexEngine | WithoutModel, training: bool) -> None:
    """Time scoring batches and, where there is ``training``, steps, and say what the whole will take.

    A collective. The engine is not to be trained with afterwards.
    """
    pool, run = inputs.data.train, engine.run
    tokens = int(pool.lengths.sum()) if isinstance(pool, Pool) else 0
    lines = ["dry run: the data is streamed, its size is not known"]
    if isinstance(pool, Pool):
        lines = [f"dry run: the pool has {len(pool):,} samples, {tokens:,} tokens"]
    if run.packing is not None:
        lines.append(f"  packs: {packs_line(run.packing)}")
    seconds = 0.0
    passes = sum(phase.decides for phase in run.schedule.phases) if training else 1
    if isinstance(engine.planner, SelectPlanner) and engine.planner.selector.scores_once:
        passes = min(1, passes)
    scores = inputs.cfg.score.score_token_losses or isinstance(engine.planner, SelectPlanner)
    if isinstance(pool, Pool) and scores:
        probe = _probe(pool, engine)
        each = probe.seconds * tokens / max(1, probe.tokens)
        seconds += passes * each
        lines.append(
            f"  scoring: {duration(each)} a pass, {passes} passes = {duration(passes * each)} "
            f"({probe.samples / probe.seconds:,.1f} samples/s, {probe.tokens / probe.seconds:,.0f} tokens/s "
            f"in a batch of {probe.samples:,} samples)"
        )
        kept = 4 * tokens if inputs.cfg.score.score_token_losses else probe.row_bytes * len(pool)
        what = "token losses" if inputs.cfg.score.score_token_losses else probe.kept
        lines.append(f"  disk: {size(kept)} of {what} a pass, {size(passes * kept)} in all")
    if training:
        assert isinstance(engine, DataflexEngine)
        step = engine.trial_step()
        seconds += run.total_steps * step
        lines.append(f"  training: {run.total_steps:,} steps of {step:.3g} s = {duration(run.total_steps * step)}")
    more = "the start, evaluations and saves" if training else "the start"
    lines.append(f"  expected time: {duration(seconds)} and {more}; memory of a process: {memory_in_use()}")
    for line in lines:
        logger.info(line)


def _probe(pool: Pool, engine: DataflexEngine | WithoutModel) -> Probe:
    """What a batch of the pass takes: of the selector's own, or of losses."""
    probe = Probe()
    planner = engine.planner
    passes = getattr(planner.selector, "passes", None) if isinstance(planner, SelectPlanner) else None
    if isinstance(planner, SelectPlanner) and isinstance(passes, ScoringPasses):
        selector: Any = planner.selector  # with passes it has scores; a table's rule may need a number of picks
        passes.probe = probe
        (selector.table if isinstance(selector, TargetSelector) else selector.scores)()
        passes.probe = None
    else:
        time_batches(probe, engine.scorer, pool, lambda ids: engine.scorer.losses(pool, ids))
    return probe
