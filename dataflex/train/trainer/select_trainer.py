"""The hook that asks a selector: warm-up on random samples, then one decision per phase."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dataflex.core.clock import SCORE
from dataflex.core.context import Run
from dataflex.core.hook import Planner
from dataflex.core.packing import drawn
from dataflex.core.plan import Floats, Ids, Phase, Plan, check_sample_ids, generator
from dataflex.train.decisions import served
from dataflex.train.decisions.record import write_decision, write_table
from dataflex.train.selector.base_selector import Selector
from dataflex.train.trainer.static_trainer import uniform_plan
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

ASKS, ENOUGH = 8, 0.98
"""How often a selector is asked at most for picks that fill their packs, and how full they need to be."""
DomainCounts = Callable[[int], Ids]


class SelectPlanner(Planner):
    """Turns a selector's picks into the plan of a phase.

    A phase that goes on with an earlier decision trains on the same picks in a new order. Where samples are packed, the
    selector is asked for as many as fill the phase's rows, which takes a few asks (`ASKS` at most).
    """

    def __init__(self, selector: Selector, name: str, tokenizer: Any = None) -> None:
        self.selector = selector
        self.name = name
        self.tokenizer = tokenizer
        self.picks: Ids = np.empty(0, dtype=np.int64)
        self.starts: Ids | None = None  # of the rows that the picks are packed in

    def on_train_start(self, run: Run) -> None:
        """UserError where a decision asks for more samples than the pool can give, or the selector can take."""
        asked = max((p.steps * run.global_batch for p in run.schedule.phases if p.decides), default=0)
        given, rows = (len(run.pool), "samples") if run.packing is None else (run.packing.pool.rows, "packs")
        if asked > given and not self.selector.replacement:
            raise UserError(
                f"update_step: a decision picks update_step x global batch = {asked} {rows} without replacement, "
                f"the pool has {given}; lower update_step or the batch, or use a selector with replacement"
            )
        most, limit = self.selector.most_picks, self.selector.limit
        if most is not None and asked > most and not self.selector.replacement:
            raise UserError(
                f"{self.name}: {limit}: {most:,} samples may be taken at most for this target, a decision picks "
                f"update_step x global batch = {asked:,} {rows}; {self.selector.limit_advice}"
            )

    def plan(self, run: Run, phase: Phase) -> Plan:
        return self._warmup(run, phase) if phase.decision == 0 else self.draw(run, phase)

    def draw(
        self, run: Run, phase: Phase, counts: DomainCounts | None = None, most: int | None = None, **record: Any
    ) -> Plan:
        """The plan of a phase after the warm-up; asks the selector where the phase decides.

        counts: of so many samples how many must be of each domain; most: how many can be. record: goes into the
        decision's file.
        """
        if phase.decides:
            return self._decide(run, phase, counts, most, record)
        rows = np.resize(np.arange(self._picked.rows), phase.steps * run.global_batch)
        return self._picked.take(generator(run.seed, "picks order", phase.index).permutation(rows))

    @property
    def _picked(self) -> Plan:
        return Plan(self.picks, _evenly(self.picks), self.starts)

    def _warmup(self, run: Run, phase: Phase) -> Plan:
        """Random samples as in static training of the same seed, unless the selector has a warm-up of its own."""
        if type(self.selector).warmup is Selector.warmup:
            return uniform_plan(run, phase, "epoch")

        def ask(count: int) -> Plan:
            ids = check_sample_ids(
                dist.broadcast_object(self.selector.warmup(count, replacement=count > len(run.pool))),
                pool_size=len(run.pool),
                asked=count,
                replacement=True,
                source=f"selector '{self.name}' (warmup)",
            )
            return Plan(ids, np.full(count, 1.0 / len(run.pool)))

        keeps = self.selector.keep_order
        return drawn(run.packing, ask, phase.steps * run.global_batch, keeps_order=keeps, asks=ASKS, enough=ENOUGH)

    def _decide(
        self, run: Run, phase: Phase, counts: DomainCounts | None, most: int | None, record: dict[str, Any]
    ) -> Plan:
        """Ask the selector, for as many samples as the phase holds, and write down what it decided."""
        selector, answers = self.selector, dict[int, Any]()

        def ask(count: int) -> Plan:
            picks = self._ask(run, phase, count, None if counts is None else counts(count))
            answers[count] = picks, selector.metric, selector.scored, selector.served
            if selector.keep_order:
                return Plan(picks, _evenly(picks))
            order = generator(run.seed, "picks order", phase.index).permutation(count)
            return Plan(picks[order], _evenly(picks))

        rows = phase.steps * run.global_batch
        if most is None and not selector.replacement:
            most = len(run.pool)
        if run.packing is not None and most is not None and most < rows:
            raise UserError(
                f"selector '{self.name}' at step {run.step}: {rows:,} packs are to be filled, and in the mixer's "
                f"proportions only {max(0, most):,} samples can be picked without replacement; lower update_step"
            )
        how = {"keeps_order": selector.keep_order, "asks": ASKS, "enough": ENOUGH}
        plan = drawn(run.packing, ask, rows, most, **how)
        picks, selector.metric, selector.scored, selector.served = answers[len(plan.sample_ids)]
        selector.forget()
        last = self.picks
        self.picks, self.starts = (picks, None) if plan.starts is None else (plan.sample_ids, plan.starts)
        packs = "" if run.packing is None else f", {plan.rows:,} packs {run.packing.fill(plan):.1%} full"
        said = f"picked {len(picks):,} of {len(run.pool):,} samples{packs}: {shares(run, picks)}"
        logger.info(f"step {run.step}: {self.name} {said}")
        record |= served.report(run, self.name, selector, picks, last, counts is not None)
        write_table(run, self.name, selector, picks)
        write_decision(run, self.name, {"indices": picks.tolist(), "metric": selector.metric, **record})
        return plan

    def _ask(self, run: Run, phase: Phase, count: int, domain_counts: Ids | None) -> Ids:
        """The selector's answer, checked: int64 [count]."""
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
        rows = {} if self.starts is None else {"starts": self.starts}
        return {"picks": self.picks, **rows, "selector": self.selector.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.picks = np.asarray(state["picks"], dtype=np.int64)
        self.starts = np.asarray(state["starts"], dtype=np.int64) if "starts" in state else None
        self.selector.load_state_dict(state["selector"])


def _evenly(picks: Ids) -> Floats:
    """The probability of each pick, float64 [n]: that of any one of the samples picked."""
    return np.full(len(picks), 1.0 / max(1, len(np.unique(picks))))


def shares(run: Run, picks: Ids) -> str:
    """Shares of the domains among the picks, for the screen: ``maths 81% (pool 50%), ...``."""
    domains = np.asarray(run.pool.domain_ids)
    k = len(run.pool.domain_names)
    of_picks = np.bincount(domains[picks], minlength=k) / max(1, len(picks))
    of_pool = np.bincount(domains, minlength=k) / len(domains)
    parts = zip(run.pool.domain_names, of_picks, of_pool, strict=True)
    return ", ".join(f"{name} {a:.0%} (pool {b:.0%})" for name, a, b in parts)
