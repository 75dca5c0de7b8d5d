"""What a decision did for each subtask of its target, and what it shares with a random draw and the last decision."""

from __future__ import annotations

from typing import Any

import numpy as np

from dataflex.core.context import Run
from dataflex.core.plan import Ids
from dataflex.report.summary import told_apart
from dataflex.train.selector.base_selector import Selector, Served
from dataflex.utils.logging import logger

STARVED = 0.2
SHOWN = 6


def overlap(run: Run, picks: Ids, last: Ids, *, by_domain: bool, replacement: bool) -> dict[str, float | None]:
    """Shares of the distinct picks: ``random``, expected in a random draw of as many; ``last``, in ``last`` as well.

    by_domain: the draw is of as many of each domain. last: None without a decision before.
    """
    domains = np.asarray(run.pool.domain_ids) if by_domain else np.zeros(len(run.pool), dtype=np.int64)
    asked, there = np.bincount(domains[picks], minlength=domains.max() + 1), np.bincount(domains)
    chance = 1 - (1 - 1 / np.maximum(1, there)) ** asked if replacement else asked / np.maximum(1, there)
    distinct = np.unique(picks)
    if not len(distinct):
        return {"random": None, "last": None}
    before = float(np.isin(distinct, last).mean()) if len(last) else None
    return {"random": float(chance[domains[distinct]].mean()), "last": before}


def of_subtasks(served: Served, picks: Ids, last: Ids) -> dict[str, dict[str, Any]]:
    """{subtask: picks, their share of all, lowest and highest score, share of them that were in the last decision}."""
    found: dict[str, dict[str, Any]] = {}
    for k, name in enumerate(served.names):
        mine = np.flatnonzero(served.of_picks == k)
        facts: dict[str, Any] = {"picks": len(mine), "share": len(mine) / max(1, len(picks))}
        if len(mine):
            facts |= {"lowest": float(served.score[mine].min()), "highest": float(served.score[mine].max())}
        if len(mine) and len(last):
            facts["last"] = float(np.isin(picks[mine], last).mean())
        found[name] = facts
    return found


def starved(subtasks: dict[str, dict[str, Any]]) -> list[str]:
    """The subtasks with less than a fifth of an equal share, where there are picks enough to go round."""
    total = sum(facts["picks"] for facts in subtasks.values())
    if total < len(subtasks):
        return []
    return [name for name, facts in subtasks.items() if facts["picks"] < STARVED * total / len(subtasks)]


def report(run: Run, name: str, selector: Selector, picks: Ids, last: Ids, by_domain: bool) -> dict[str, Any]:
    """What of this goes into the decision's file; the same in few words on the screen, and a warning."""
    shared = overlap(run, picks, last, by_domain=by_domain, replacement=selector.replacement)
    record: dict[str, Any] = {"overlap": shared}
    before = "" if shared["last"] is None else f", {shared['last']:.0%} were in the last decision"
    chance = f"{shared['random'] or 0:.0%} would be in a random draw{before}"
    served = selector.served
    if served is None:
        logger.info(f"step {run.step}: {name}: of the picks {chance}")
        return record
    subtasks = record["subtasks"] = of_subtasks(served, picks, last)
    words = [_words(task, facts) for task, facts in subtasks.items()]
    if len(words) > SHOWN:
        words = [*words[: SHOWN - 1], f"{len(words) - SHOWN + 1} more in decisions/step_{run.step}.json"]
    logger.info(f"step {run.step}: {name} serves {', '.join(words)}; {chance}")
    poor = starved(subtasks)
    if poor:
        counts = ", ".join(f"'{task}' {subtasks[task]['picks']:,}" for task in poor[:SHOWN])
        more = f" and {len(poor) - SHOWN} more" if len(poor) > SHOWN else ""
        logger.warning(
            f"step {run.step}: {name}: of {len(picks):,} picks for {len(subtasks)} subtasks few serve {counts}{more}: "
            f"less than a fifth of an equal share, {len(picks) / len(subtasks):,.0f}; {served.advice}"
        )
    return record


def _words(task: str, facts: dict[str, Any]) -> str:
    low, high = told_apart(facts["lowest"], facts["highest"]) if facts["picks"] else ("", "")
    scores = "" if not facts["picks"] else f" ({low})" if low == high else f" ({low} to {high})"
    return f"{task} {facts['share']:.0%}{scores}"
