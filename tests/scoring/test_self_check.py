"""The self-check sees what it is there to see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dataflex.scoring.checks import self_check
from dataflex.scoring.gradients import taps
from dataflex.scoring.gradients.spec import FeatureSpec
from dataflex.utils.errors import UserError
from tests import families
from tests.scoring.test_coverage import pool, scorer

SPEC = FeatureSpec(adam="adam_less", proj_dim=64)
IDS = np.arange(3)


def checked(family: str = "mixtral", spec: FeatureSpec = SPEC) -> tuple[list[str], Any]:
    """The names of the checks that fail, and what was scored with."""
    net = families.model(family)
    scoring = scorer(net)
    scoring.engine.optimizer = torch.optim.Adam(net.parameters())
    verdicts = self_check.check_scoring(scoring, pool(), IDS, spec)
    assert all(v.line.startswith("ok  " if v.ok else "FAIL") for v in verdicts)
    return [v.what for v in verdicts if not v.ok], scoring


@pytest.mark.parametrize("family", ["gpt2", "gemma", "mixtral"])
@pytest.mark.parametrize("spec", [SPEC, FeatureSpec(adam="adam_less", proj_dim=0)])
def test_a_good_model_passes_and_stays_as_it_was(family: str, spec: FeatureSpec) -> None:
    failed, scoring = checked(family, spec)
    assert not failed
    self_check.check_one_sample(scoring, pool(), spec)


def test_a_wrong_tap_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "normalised", lambda module, x: x)
    failed, scoring = checked()
    assert failed == ["single-sample autograd"]
    with pytest.raises(RuntimeError, match="self-check of the gradient features failed: 1 sample, largest relative"):
        self_check.check_one_sample(scoring, pool(), SPEC)


def test_a_pass_that_changes_training_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    original = self_check.Scorer.gradient_features

    def draws(self: Any, *args: Any, **how: Any) -> Any:
        torch.rand(1)
        next(self.engine.module.parameters()).data.mul_(1 + 1e-6)
        return original(self, *args, **how)

    monkeypatch.setattr(self_check.Scorer, "gradient_features", draws)
    net = families.model("llama")
    scoring = scorer(net)
    scoring.engine.optimizer = torch.optim.Adam(net.parameters())
    verdicts = self_check.check_scoring(scoring, pool(), IDS, SPEC)
    assert verdicts[-1].line == "FAIL  training state: changed: parameters, random state"
    with pytest.raises(UserError, match="check: failed: training state"):
        self_check.require(verdicts)


def test_features_that_depend_on_what_a_sample_is_scored_with_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another order is another batch for most samples: here the first of a call comes out a tenth larger."""
    original = self_check._values

    def first_is_larger(*args: Any) -> Any:
        values = original(*args).copy()
        values[0] *= 1.1
        return values

    monkeypatch.setattr(self_check, "_values", first_is_larger)
    failed, _ = checked("llama")
    assert "ranks agree" in failed


def test_a_pass_that_leaves_a_module_in_another_mode_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    original = self_check.Scorer.gradient_features

    def forgets(self: Any, *args: Any, **how: Any) -> Any:
        found = original(self, *args, **how)
        next(iter(self.engine.module.children())).training ^= True
        return found

    monkeypatch.setattr(self_check.Scorer, "gradient_features", forgets)
    monkeypatch.setattr(self_check, "compare_with_autograd", lambda *_: self_check.Verdict("autograd", True, ""))
    assert changes_of(families.model("llama")) == ["training mode"]


def changes_of(net: torch.nn.Module) -> list[str]:
    """What of the state of training differs behind a pass of an odd number of calls."""
    scoring = scorer(net.train())
    scoring.engine.optimizer = torch.optim.Adam(net.parameters())
    before = self_check.state_checksums(scoring.engine)
    scoring.gradient_features(pool(), **SPEC.projected())
    after = self_check.state_checksums(scoring.engine)
    return [key for key in before if before[key] != after[key]]


def test_what_is_frozen_stays_frozen_behind_a_pass() -> None:
    net = families.model("llama")
    for parameter in list(net.parameters())[:3]:
        parameter.requires_grad_(False)
    assert changes_of(net) == []


def test_features_that_are_zero_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps.Taps, "_deliver", lambda self, target, *_: self.fired.update(target.names.values()))
    failed, _ = checked("llama")
    assert "non-zero" in failed and "single-sample autograd" in failed
