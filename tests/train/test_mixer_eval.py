"""mixer_eval_dataset reaches the mixer that names it, and is not dropped without a word by one that does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dataflex.config import load_config
from dataflex.core.registry import REGISTRY, register_mixer
from dataflex.core.weights import StaticWeights
from dataflex.train.mixer.base_mixer import Mixer
from dataflex.train.trainer import component_hooks
from tests.train.test_planners import make_run


@pytest.mark.parametrize("name, told", [("looks_at_it", False), ("random", True)])
def test_it_is_passed_on_or_said_to_be_unused(
    name: str, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(REGISTRY._classes, "mixer", dict(REGISTRY._classes["mixer"]))

    @register_mixer("looks_at_it")
    class LooksAtIt(Mixer):
        def __init__(self, mixture_manager: Any, mixer_eval_dataset: Any) -> None:
            super().__init__(mixture_manager)
            self.held_out = mixer_eval_dataset

        def mix(self, model: Any, step_id: int, **kwargs: Any) -> Any:
            return np.ones(3)

    monkeypatch.setattr(component_hooks, "component_params", lambda flex, kind: (name, {}))
    run = make_run()
    run.engine.device = torch.device("cpu")
    builder = component_hooks.HookBuilder(run, load_config({}, embedded=True), StaticWeights(), None, None)
    builder.runtime |= {"mixer_eval_dataset": ["held out"], "scorer": None}
    mixer, _ = builder._component("mix")
    assert getattr(mixer, "held_out", None) == (None if told else ["held out"])
    assert ("mixer_eval_dataset: not used" in capsys.readouterr().err) is told
