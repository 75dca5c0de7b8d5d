"""`choose` from one number for each sample."""

from __future__ import annotations

from typing import Any

import numpy as np

from dataflex.scoring.decide import choose as choosing
from dataflex.scoring.decide.table import ArrayTable


def choose(scores: np.ndarray, *given: Any, **how: Any) -> np.ndarray:
    """Sample ids, best first. scores: [n]; the rest as `dataflex.scoring.decide.choose.choose` takes it."""
    return choosing.choose(ArrayTable(scores.astype(np.float32)[:, None]), *given, **how).picks
