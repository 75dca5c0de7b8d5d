"""Adam's moments and constants of an optimizer that has taken two steps by hand, one of three having been skipped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dataflex.engine.optimizer_state import read_moments
from dataflex.utils.errors import UserError

FIRST, SECOND = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 4.0]])


def engine(optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, **how: Any) -> Any:
    module = torch.nn.Linear(2, 1, bias=False)
    made = optimizer(module.parameters(), lr=0.1, **how)
    for gradient in (FIRST, SECOND):
        module.weight.grad = gradient.clone()
        made.step()
    return SimpleNamespace(module=module, optimizer=made, device="cpu", global_steps=3, skipped_steps=1)


def test_moments_and_constants_by_hand() -> None:
    moments, constants = read_moments(engine(betas=(0.8, 0.95), eps=1e-6), ["weight"])
    first, second = moments["weight"]
    torch.testing.assert_close(first, 0.8 * 0.2 * FIRST + 0.2 * SECOND)
    torch.testing.assert_close(second, 0.95 * 0.05 * FIRST**2 + 0.05 * SECOND**2)
    assert (constants.kind, constants.beta1, constants.beta2, constants.eps) == ("adam", 0.8, 0.95, 1e-6)
    assert constants.step == 2, "the skipped step has moved no moment"


def test_before_the_first_update_they_are_zero() -> None:
    fresh = engine()
    fresh.global_steps = 1
    moments, constants = read_moments(fresh, ["weight"])
    assert constants.step == 0 and not any(moment.any() for moment in moments["weight"])


def test_an_optimizer_without_moments_is_named() -> None:
    with pytest.raises(UserError, match="gradient_type: adam needs an Adam optimizer, this run uses SGD"):
        read_moments(engine(torch.optim.SGD), ["weight"])
