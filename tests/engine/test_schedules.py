"""Learning rates of the schedules that take options, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dataflex.config.sections.train import TrainSection
from dataflex.engine.optimizer import make_scheduler
from dataflex.utils.errors import UserError


def rates(steps: int, **keys: Any) -> list[float]:
    """The learning rate of each step of a run of ``steps`` with a peak of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer, TrainSection(learning_rate=1.0, **keys), steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_warmup_stable_decay_is_stable_for_a_third_of_the_rest() -> None:
    # 2 steps of warm-up, 7 are left: 2 stable ones, then 5 of decay, a cosine: (1 + cos(k pi / 5)) / 2.
    found = rates(9, lr_scheduler_type="warmup_stable_decay", warmup_steps=2)
    falling = [1.0, 0.9045085, 0.6545085, 0.3454915, 0.0954915]
    assert found == pytest.approx([0.0, 0.5, 1.0, 1.0, *falling], abs=1e-6)
    own = rates(4, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 4})
    assert own == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466], abs=1e-6)


def test_cosine_ends_at_its_least_rate() -> None:
    found = rates(5, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 0.2}, warmup_steps=1)
    assert found == pytest.approx([0.0, 1.0, 0.8828427, 0.6, 0.3171573], abs=1e-6)


def test_options_that_a_schedule_does_not_take_are_named() -> None:
    with pytest.raises(UserError, match=r"^lr_scheduler_kwargs: cosine does not take \{'min_lr': 0.1\}: "):
        rates(2, lr_scheduler_type="cosine", lr_scheduler_kwargs={"min_lr": 0.1})
    with pytest.raises(UserError, match="^lr_scheduler_kwargs: cosine_with_min_lr does not take {}: "):
        rates(2, lr_scheduler_type="cosine_with_min_lr")
