"""Learning rates of the schedules that take options, by hand."""

from __future__ import annotations

import inspect
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dataflex.config import load_config
from dataflex.config.sections.schedule import OPTIONS
from dataflex.config.sections.train import TrainSection
from dataflex.engine.optimizer import make_scheduler
from dataflex.train.trainer.build import make_schedule
from tests.distributed import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from llamafactory_runs import CASES, COMMON  # noqa: E402

LLAMAFACTORY = Path(__file__).with_name("llamafactory_rates.json")


def rates(steps: int, **keys: Any) -> list[float]:
    """The learning rate of each step of a run of ``steps`` with a peak of 1."""
    return rates_of(TrainSection(learning_rate=1.0, **keys), steps)


def rates_of(train: TrainSection, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=train.learning_rate)
    scheduler = make_scheduler(optimizer, train, steps)
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
    # Two of six are stable, then five of decay: the last is not reached.
    own = rates(6, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 5})
    assert own == pytest.approx([1.0, 1.0, *falling[:4]], abs=1e-6)
    # Of nine six decay whatever is stable, so that the last one is at the end of a cosine of six.
    own = rates(9, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_stable_steps": 2})
    assert own == pytest.approx([1.0, 1.0, *((1 + math.cos(k * math.pi / 6)) / 2 for k in range(7))], abs=1e-6)


def test_cosine_ends_at_its_least_rate() -> None:
    found = rates(5, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 0.2}, warmup_steps=1)
    assert found == pytest.approx([0.0, 1.0, 0.8828427, 0.6, 0.3171573], abs=1e-6)


def test_a_warm_up_is_steps_or_a_share_of_all() -> None:
    def peak(steps: int, **keys: Any) -> int:
        found = rates(steps, **keys)
        return found.index(max(found))

    assert peak(18, warmup_ratio=0.1) == 2, "1.8 steps are rounded up"
    assert peak(18, warmup_steps=0.3) == 6
    assert peak(18, warmup_steps=4, warmup_ratio=0.5) == 4
    assert peak(18, warmup_steps=0, warmup_ratio=0.5) == 9
    assert peak(18) == 0


def test_the_options_are_those_of_transformers() -> None:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    made_here = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for name, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        if name.value in OPTIONS:
            assert set(OPTIONS[name.value]) == set(inspect.signature(function).parameters) - made_here, name
    assert set(OPTIONS) <= {name.value for name in TYPE_TO_SCHEDULER_FUNCTION}


@pytest.mark.parametrize(
    ("case", "kept"),
    [(name, kept) for name, kept in json.loads(LLAMAFACTORY.read_text()).items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_steps_and_rates_are_those_of_llamafactory(case: str, kept: dict[str, Any]) -> None:
    """Of the runs of benchmarks/against_llamafactory.py; rates of each step, rows as its loader had them."""
    keys = {key: value for key, value in (COMMON | CASES[case].keys).items() if value is not None}
    cfg = load_config(keys, embedded=True, quiet=True)
    batch = cfg.train.per_device_train_batch_size * cfg.train.gradient_accumulation_steps
    epochs = cfg.train.num_train_epochs
    schedule = make_schedule(cfg.flex, pool_size=kept["rows"], global_batch=batch, epochs=epochs, fixed=cfg.fixed_steps)
    assert rates_of(cfg.train, schedule.total_steps) == pytest.approx(kept["rates"], rel=1e-6, abs=1e-12)
