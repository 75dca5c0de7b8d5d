"""The multipliers of drawn samples by hand, and the identity that a checkpoint compares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.core.weights import StaticWeights

LOSS, DRAW = np.array([1.0, 2.0, 0.0, 4.0]), np.array([0.1, 0.2, 0.3, 0.4])
ROWS, PROBABILITIES = np.array([3, 1, 0]), np.array([0.4, 0.2, 0.1])


def test_multipliers_by_hand() -> None:
    assert StaticWeights().of(ROWS, PROBABILITIES, 4) is None
    own = StaticWeights(LOSS).of(ROWS, PROBABILITIES, None)
    assert own is not None and own.tolist() == [4.0, 2.0, 1.0]
    corrected = StaticWeights(draw=DRAW, corrected=True).of(ROWS, PROBABILITIES, 4)
    np.testing.assert_allclose(corrected, [1 / 1.6, 1 / 0.8, 1 / 0.4])
    both = StaticWeights(LOSS, DRAW, corrected=True).of(ROWS, PROBABILITIES, 4)
    np.testing.assert_allclose(both, [4 / 1.6, 2 / 0.8, 1 / 0.4])


CHANGES: dict[str, Any] = {
    "loss": LOSS[::-1],
    "draw": DRAW[::-1],
    "corrected": True,
    "class_weight": torch.tensor([1.0, 2.0]),
    "tokens": True,
}


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_identity(field: str) -> None:
    weights = StaticWeights(LOSS, DRAW, class_weight=torch.tensor([2.0, 1.0]))
    assert replace(weights, loss=LOSS.copy()).identity == weights.identity
    assert replace(weights, **{field: CHANGES[field]}).identity != weights.identity
    assert replace(weights, loss=None).identity != replace(weights, draw=None).identity
    assert set(CHANGES) == set(StaticWeights.__dataclass_fields__), "a field needs a row"
