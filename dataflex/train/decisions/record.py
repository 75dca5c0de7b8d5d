"""decisions/: step_N.json says what was decided and from what, step_N.parquet what became of every sample."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from dataflex import __version__
from dataflex.core.context import Run
from dataflex.core.plan import Ids
from dataflex.report import decision_table as tables
from dataflex.train.selector.base_selector import Selector
from dataflex.utils.files import write_atomically


def write_decision(run: Run, component: str, content: dict[str, Any]) -> None:
    """Rank 0 writes ``decisions/step_<steps done>.json`` into the run's folder, if it has one.

    The fingerprint names what the decision was made from: pool, component, step and package version.
    """
    if run.output_dir is None or not run.is_main:
        return
    record = {
        "step": run.step,
        "component": component,
        "fingerprint": {
            "pool": run.pool.fingerprint,
            "global_batch": run.global_batch,
            "seed": run.seed,
            "dataflex": __version__,
        },
        **content,
    }
    write_atomically(run.output_dir / "decisions" / f"step_{run.step}.json", json.dumps(record))


def write_table(run: Run, component: str, selector: Selector, picks: Ids) -> None:
    """Rank 0 writes ``decisions/step_<steps done>.parquet`` into the run's folder, if it has one."""
    if run.output_dir is None or not run.is_main:
        return
    pool, scored = run.pool, dict(selector.scored)
    of_picks = selector.metric.get(tables.SCORE, ())
    if not scored and len(of_picks) == len(picks):
        scored[tables.SCORE] = np.full(len(pool), np.nan)
        scored[tables.SCORE][picks] = of_picks
    known = int((~np.isnan(scored[tables.SCORE])).sum()) if tables.SCORE in scored else 0
    columns = [
        *tables.pool_columns(pool),
        *tables.score_columns(scored, len(pool), f"selector '{component}' at step {run.step}"),
        tables.picked_column(picks, len(pool), selector.replacement),
    ]
    facts = tables.Facts(run.step, component, known, tables.contents_of(pool))
    tables.write_table(run.output_dir / "decisions" / f"step_{run.step}.parquet", columns, len(pool), facts)
