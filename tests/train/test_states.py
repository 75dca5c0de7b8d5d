"""What a resume takes back of each component and hook, one by one: the state of another, all of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.report.trainer_log import LogHook
from dataflex.train.mixer.doremi_mixer import DoremiMixer
from dataflex.train.mixer.dynamic_moe_mixer import DynamicMoeMixer
from dataflex.train.mixer.mixture import MixtureManager
from dataflex.train.mixer.odm_mixer import OdmMixer
from dataflex.train.trainer.mix_trainer import MixPlanner
from dataflex.train.trainer.select_trainer import SelectPlanner
from dataflex.train.weighter.adapt_weighter import AdaptWeighter
from tests.engine.test_state_encoding import same
from tests.tiny import tiny_llama, tiny_mixtral
from tests.train.test_planners import DOMAINS, NAMES, Told

SUMS, TOKENS = np.array([9.0, 2.0, 0.0]), np.array([3.0, 4.0, 0.0])


def manager() -> MixtureManager:
    return MixtureManager(DOMAINS, NAMES, np.array([0.5, 0.3, 0.2]), 3)


def scorer(model: Any) -> Any:
    return SimpleNamespace(engine=SimpleNamespace(module=model), device=torch.device("cpu"))


def doremi() -> DoremiMixer:
    return DoremiMixer(manager(), None, lambda path: lambda micro: torch.zeros(1), "x")


def learned(made: Any) -> Any:
    for _ in range(2):
        made.learn(SUMS, TOKENS)
    return made


def moe() -> DynamicMoeMixer:
    pool = SimpleNamespace(domain_names=NAMES, domain_ids=DOMAINS)
    return DynamicMoeMixer(manager(), pool, scorer(tiny_mixtral()))


def decided(made: DynamicMoeMixer) -> DynamicMoeMixer:
    made.weights, made.distances = np.array([0.1, 0.2, 0.7]), np.array([0.3, 0.4, 0.5])
    return made


def drawn(made: MixtureManager) -> MixtureManager:
    made.take(np.array([0.15, 0.35, 0.5]), 7)
    return made


def planned(made: MixPlanner) -> MixPlanner:
    drawn(made.manager)  # type: ignore[arg-type]
    learned(made.mixer)
    made.tokens = np.array([5, 6, 7])
    return made


def picked(made: SelectPlanner) -> SelectPlanner:
    made.picks, made.starts = np.array([4, 1, 3]), np.array([0, 2, 3])
    return made


def anchored(made: AdaptWeighter) -> AdaptWeighter:
    made.anchors, made.refreshed = torch.randn(1, 4), 7
    return made


def logged(made: LogHook) -> LogHook:
    made.history, made._losses = [{"current_steps": 3, "loss": 2.0}], [1.5, 2.5]
    made._sum, made._steps, made._samples, made.clock.scored = 9.0, 4, 24, 11
    made.clock._seconds["score"] = 2.0
    return made


# How one is made, and what a run makes of it.
ROWS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "doremi": (doremi, learned),
    "odm": (lambda: OdmMixer(manager()), learned),
    "dynamic_moe": (moe, decided),
    "mixture": (manager, drawn),
    "mix planner": (lambda: MixPlanner(manager(), doremi(), "doremi"), planned),
    "select planner": (lambda: SelectPlanner(Told(), "told"), picked),
    "adapt": (lambda: AdaptWeighter([1, 2, 3], scorer(tiny_llama())), anchored),
    "log": (lambda: LogHook(3), logged),
}


# What is another object's, which has a row of its own.
UNMOVED = {"select planner": ("selector",), "mix planner": ("selection",)}


@pytest.mark.parametrize("name", ROWS)
def test_a_fresh_one_takes_back_all_of_the_state(name: str) -> None:
    make, run = ROWS[name]
    state, fresh = run(make()).state_dict(), make()
    assert not same(state, fresh.state_dict()), "the run has changed nothing"
    for key, value in fresh.state_dict().items():
        assert not same(value, state[key]) or key in UNMOVED.get(name, ()), f"the run has not changed {key}"
    fresh.load_state_dict(state)
    assert same(state, fresh.state_dict())
