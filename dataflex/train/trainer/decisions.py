"""decisions/step_N.json: what was decided, and from what."""

from __future__ import annotations

import json
from typing import Any

from dataflex import __version__
from dataflex.core.context import Run
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
