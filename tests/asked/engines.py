"""Builds the engines of the table: two ranks build each once and look its rows' facts up."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from dataflex.driver.setup import build_engine, read_inputs, with_components
from tests.asked.decision_rows import DOREMI, MIX, MOE, SELECT, STRATIFIED, WEIGHTED
from tests.asked.table import Built, Row
from tests.asked.training_rows import AUTOS, FREEZE, HALF, LORA, TRAINING

BUILDS = (TRAINING, LORA, HALF, FREEZE, AUTOS, WEIGHTED, SELECT, MIX, STRATIFIED, MOE, DOREMI)


def facts(folder: str) -> dict[str, Any]:
    """{build: {key: fact}} of every build; runs on each rank."""
    found: dict[str, Any] = {}
    for build in BUILDS:
        cfg = with_components(build.config(Path(folder)))
        inputs = read_inputs(cfg)
        built = Built(cfg, Path(folder), build_engine(inputs), inputs)
        found[build.name] = [_fact(row, built) for row in build.rows]
    return found


def _fact(row: Row, built: Built) -> Any:
    """What came of the row, or of looking it up: one that raises must not hide the others."""
    try:
        return row.fact(built)
    except Exception:
        return traceback.format_exc()
