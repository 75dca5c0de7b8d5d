"""Moments of the parameters' size in a gradient pass: read layer by layer, dropped behind it, the same features."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.scoring.gradients.coverage import find_targets, parameter_names
from dataflex.scoring.gradients.layer_state import LayerState
from dataflex.scoring.gradients.layers import LayerRule
from dataflex.scoring.scorer import Scorer
from tests import families
from tests.scoring.test_coverage import CONSTANTS, PROJ_DIM, SEED, pool, random_moments, scorer


class Watched(Mapping[str, Any]):
    """Moments of which every lookup makes a copy; what is alive of the copies is counted, in bytes."""

    def __init__(self, moments: dict[str, Any]) -> None:
        self.moments = self.all = moments
        self.reads: Counter[str] = Counter()
        self.alive = self.peak = 0

    def __getitem__(self, name: str) -> Any:
        self.reads[name] += 1
        made = tuple(moment.clone() for moment in self.moments[name])
        for moment in made:
            self.alive += moment.nbytes
            weakref.finalize(moment, self._gone, moment.nbytes)
        self.peak = max(self.peak, self.alive)
        return made

    def only(self, names: list[str]) -> Watched:
        """Of these parameters, as the engine's moments are made."""
        self.moments = {name: self.all[name] for name in names}
        return self

    def _gone(self, size: int) -> None:
        self.alive -= size

    def __iter__(self) -> Iterator[str]:
        return iter(self.moments)

    def __len__(self) -> int:
        return len(self.moments)


def watched_scorer(net: torch.nn.Module) -> tuple[Scorer, Watched]:
    made, moments = scorer(net), Watched(random_moments(net))
    made._read_moments = lambda names: (moments.only(names), CONSTANTS)
    return made, moments


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama tied", "gpt2", "mixtral", "lora"])
def test_a_pass_holds_the_moments_of_one_layer_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = families.with_lora(families.model("llama")) if family == "lora" else families.model(family)
    samples, how = pool(6), {"proj_dim": PROJ_DIM, "seed": SEED, "adam": "adam_less"}
    usual, whole = watched_scorer(net)
    wanted = usual.gradient_features(samples, **how)
    names = set(parameter_names(find_targets(net, None)))
    assert whole.reads == dict.fromkeys(names, 1), "what fits is read once a pass"
    monkeypatch.setattr("dataflex.scoring.gradients.layer_state.KEPT_BYTES", 0)
    made, moments = watched_scorer(net)
    got = made.gradient_features(samples, **how)
    np.testing.assert_array_equal(got, wanted)
    (batches,) = set(moments.reads.values())
    assert batches > 1 and set(moments.reads) == names, "once for each batch"
    size = {name: 2 * moments.moments[name][0].nbytes for name in names}
    layers = [sum(size[n] for group in t.groups() for n in group.values()) for t in find_targets(net, None)]
    assert max(size.values()) <= moments.peak <= max(layers) < sum(size.values()) / 2
    assert moments.alive == 0, "nothing outlives the pass"


def test_moments_are_kept_inside_of_keep_moments_for_the_same_parameters() -> None:
    net, samples = families.model("llama"), pool(3)
    made, moments = watched_scorer(net)
    how = {"proj_dim": PROJ_DIM, "seed": SEED, "adam": "adam_less"}
    whole = made.gradient_features(samples, **how)
    with made.keep_moments():
        made.gradient_features(samples, layers=LayerRule.of(["last:1"], None), **how)
        np.testing.assert_array_equal(
            made.gradient_features(samples, **how), whole, "of more than was asked for before"
        )
    moments.reads.clear()
    with made.keep_moments():
        np.testing.assert_array_equal(made.gradient_features(samples, **how), whole)
        np.testing.assert_array_equal(made.gradient_features(samples, **how), whole)
        assert set(moments.reads.values()) == {1}
        last = made.gradient_features(samples, layers=LayerRule.of(["last:1"], None), **how)
    made.gradient_features(samples, **how)
    assert moments.reads["lm_head.weight"] == 2, "a step may have been taken since"
    np.testing.assert_array_equal(made.gradient_features(samples, layers=LayerRule.of(["last:1"], None), **how), last)


def test_state_is_read_once_while_it_is_at_hand_and_kept_while_it_fits() -> None:
    moments = Watched({name: (torch.ones(4), torch.ones(4)) for name in "abc"})
    state = LayerState(moments, kept_bytes=32)
    assert moments.reads == {"a": 1, "b": 1, "c": 1} and moments.alive == 32, "each is read once, one fits"
    with state.at_hand(["a", "nothing of ours"]):
        assert state["a"] is state["a"] and "nothing of ours" not in state
    assert state["a"] is state["a"] and moments.reads["a"] == 1
    with state.at_hand(["b", "c"]), state.at_hand(["b"]):
        assert state["b"] is state["b"] and moments.alive == 3 * 32
    assert moments.alive == 32 and moments.reads == {"a": 1, "b": 2, "c": 2}
    assert state.get("b") is not None and moments.reads["b"] == 3


def test_what_fits_is_read_in_one_order_before_any_layer_asks() -> None:
    """Ranks whose batches reach other layers, as of experts that get no token, would else wait for each other."""
    moments = Watched({name: (torch.ones(4), torch.ones(4)) for name in "abc"})
    state = LayerState(moments)
    assert list(moments.reads) == ["a", "b", "c"]
    with state.at_hand(["c"]), state.at_hand(["a"]):
        assert state["c"] is not None and state["a"] is not None
    assert moments.reads == {"a": 1, "b": 1, "c": 1}
