"""The hook that asks a selector: warm-up on random samples, then one decision per phase."""

from __future__ import annotations

from typing import Any

import numpy as np

from dataflex.core.clock import SCORE
from dataflex.core.context import Run
from dataflex.core.hook import Planner
from dataflex.core.plan import Ids, Phase, Plan, check_sample_ids, generator
from dataflex.train.selector.base_selector import Selector
from dataflex.train.trainer.decisions import write_decision, write_table
from dataflex.train.trainer.static_trainer import uniform_plan
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger


class SelectPlanner(Planner):
    """Turns a selector's picks into the plan of a phase.

    A phase that goes on with an earlier decision trains on the same picks in a new order.
    """

    def __init__(self, selector: Selector, name: str, tokenizer: Any = None) -> None:
        self.selector = selector
        self.name = name
        self.tokenizer = tokenizer
        self.picks: Ids = np.empty(0, dtype=np.int64)

    def on_train_start(self, run: Run) -> None:
        """UserError where a decision asks for more samples than the pool can give."""
        asked = max((p.steps * run.global_batch for p in run.schedule.phases if p.decides), default=0)
        if asked > len(run.pool) and not self.selector.replacement:
            raise UserError(
                f"update_step: a decision picks update_step x global batch = {asked} samples without replacement, "
                f"the pool has {len(run.pool)}; lower update_step or the batch, or use a selector with replacement"
            )

    def plan(self, run: Run, phase: Phase) -> Plan:
        return self._warmup(run, phase) if phase.decision == 0 else self.draw(run, phase)

    def draw(self, run: Run, phase: Phase, domain_counts: Ids | None = None, **record: Any) -> Plan:
        """The plan of a phase after the warm-up; asks the selector where the phase decides.

        domain_counts: int64 [K], how many samples must be of each domain. record: goes into the decision's file.
        """
        count = phase.steps * run.global_batch
        if phase.decides:
            self.picks = self._ask(run, phase, count, domain_counts, record)
        order = generator(run.seed, "picks order", phase.index)
        ids = self.picks if len(self.picks) == count else np.resize(self.picks, count)
        if not (self.selector.keep_order and phase.decides):
            ids = order.permutation(ids)
        return Plan(ids, np.full(count, 1.0 / len(np.unique(self.picks))))

    def _warmup(self, run: Run, phase: Phase) -> Plan:
        """Random samples as in static training of the same seed, unless the selector has a warm-up of its own."""
        if type(self.selector).warmup is Selector.warmup:
            return uniform_plan(run, phase, "epoch")
        count = phase.steps * run.global_batch
        answer = self.selector.warmup(count, replacement=count > len(run.pool))
        ids = check_sample_ids(
            dist.broadcast_object(answer),
            pool_size=len(run.pool),
            asked=count,
            replacement=True,
            source=f"selector '{self.name}' (warmup)",
        )
        return Plan(ids, np.full(count, 1.0 / len(run.pool)))

    def _ask(self, run: Run, phase: Phase, count: int, domain_counts: Ids | None, record: dict[str, Any]) -> Ids:
        source = f"selector '{self.name}' at step {run.step}"
        wanted = {} if domain_counts is None else {"domain_counts": domain_counts}
        if domain_counts is not None:
            self._check_room(run, domain_counts, source)
        with run.clock.part(SCORE):
            answer = self.selector.select(
                run.engine.module,
                step_id=run.step,
                num_samples=count,
                current_update_times=phase.decision,
                update_times=run.schedule.decisions,
                tokenizer=self.tokenizer,
                **wanted,
            )
        picks = check_sample_ids(
            dist.broadcast_object(answer),
            pool_size=len(run.pool),
            asked=count,
            replacement=self.selector.replacement,
            source=source,
        )
        if domain_counts is not None:
            got = np.bincount(run.pool.domain_ids[picks], minlength=len(domain_counts))
            if (got != domain_counts).any():
                raise UserError(f"{source}: expected {domain_counts.tolist()} samples by domain, got {got.tolist()}")
        write_table(run, self.name, self.selector, picks)
        write_decision(run, self.name, {"indices": picks.tolist(), "metric": self.selector.metric, **record})
        logger.info(f"step {run.step}: {self.name} picked {count:,} of {len(run.pool):,} samples: {shares(run, picks)}")
        return picks

    def _check_room(self, run: Run, domain_counts: Ids, source: str) -> None:
        """UserError where a domain holds fewer samples than the mixer asks for."""
        sizes = np.bincount(run.pool.domain_ids, minlength=len(domain_counts))
        short = np.flatnonzero(domain_counts > sizes)
        if len(short) and not self.selector.replacement:
            d = short[0]
            raise UserError(
                f"{source}: the mixer asks for {domain_counts[d]:,} samples of '{run.pool.domain_names[d]}' without "
                f"replacement, it has {sizes[d]:,}; lower update_step or the domain's proportion"
            )

    @property
    def identity(self) -> str:
        return f"SelectPlanner {self.name}"

    def state_dict(self) -> dict[str, Any]:
        return {"picks": self.picks, "selector": self.selector.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.picks = np.asarray(state["picks"], dtype=np.int64)
        self.selector.load_state_dict(state["selector"])


def shares(run: Run, picks: Ids) -> str:
    """Shares of the domains among the picks, for the screen: ``maths 81% (pool 50%), ...``."""
    domains = np.asarray(run.pool.domain_ids)
    k = len(run.pool.domain_names)
    of_picks = np.bincount(domains[picks], minlength=k) / max(1, len(picks))
    of_pool = np.bincount(domains, minlength=k) / len(domains)
    parts = zip(run.pool.domain_names, of_picks, of_pool, strict=True)
    return ", ".join(f"{name} {a:.0%} (pool {b:.0%})" for name, a, b in parts)
