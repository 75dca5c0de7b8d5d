"""Every mixer with one to five domains: proportions against the formulas in plain numbers, and what is then drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.core.registry import REGISTRY
from dataflex.train.mixer import dynamic_moe_mixer
from dataflex.train.mixer.mixture import MixtureManager
from dataflex.train.trainer.components import load_components

STEPS = 4
SIZES = [7, 40, 3, 21, 12]
DOMAINS = [1, 2, 3, 4, 5]
VOCABULARY = 50


def mixture(k: int) -> MixtureManager:
    """Domains of odd sizes, drawn in proportions that are not equal."""
    shares = np.arange(1.0, k + 1)
    return MixtureManager(np.repeat(np.arange(k), SIZES[:k]), [f"d{i}" for i in range(k)], shares / shares.sum(), 3)


def losses_of(step: int, k: int) -> tuple[list[float], list[float]]:
    """Token-mean losses and token counts of a step's domains; domain 1 is not in step 2."""
    losses = [0.5 + 0.3 * ((step * 7 + d * 5) % 11) for d in range(k)]
    return losses, [0.0 if (step, d) == (2, 1) else 10.0 + d for d in range(k)]


def taught(mixer: Any, k: int) -> Any:
    for step in range(STEPS):
        losses, tokens = losses_of(step, k)
        mixer.learn(np.array(losses) * tokens, np.array(tokens))
    return mixer


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def built(name: str, k: int, **params: Any) -> Any:
    config = SimpleNamespace(vocab_size=VOCABULARY, output_router_logits=False)
    pool = SimpleNamespace(domain_names=mixture(k).names, domain_ids=np.repeat(np.arange(k), SIZES[:k]))
    runtime = {
        "mixture_manager": mixture(k),
        "dataset": pool,
        "mixer_eval_dataset": None,
        "scorer": SimpleNamespace(engine=SimpleNamespace(module=SimpleNamespace(config=config))),
        "open_reference": lambda path: None,
        "reference_model_path": "somewhere",
    }
    return REGISTRY.build("mixer", name, runtime=runtime, cfg=params)


def random(k: int) -> tuple[Any, Any]:
    return built("random", k).mix(None, 2), None


def static(k: int) -> tuple[Any, Any]:
    given = [float(d * d + 1) for d in range(k)]
    return built("static", k, proportions=given).mix(None, 2), [x / sum(given) for x in given]


def stratified(k: int) -> tuple[Any, Any]:
    return built("stratified", k).mix(None, 2), [size / sum(SIZES[:k]) for size in SIZES[:k]]


def temperature(k: int) -> tuple[Any, Any]:
    powers = [size**0.3 for size in SIZES[:k]]
    return built("temperature", k, tau=0.3).mix(None, 2), [power / sum(powers) for power in powers]


def exploration(t: int, k: int) -> float:
    return 1 / k if t == 0 else min(1 / k, math.sqrt(math.log(k) / (k * t)))


def odm(k: int) -> tuple[Any, Any]:
    shares, rewards = mixture(k).proportions, [0.0] * k
    for step in range(STEPS):
        for d, (loss, tokens) in enumerate(zip(*losses_of(step, k), strict=True)):
            if tokens:
                rewards[d] = 0.6 * rewards[d] + 0.4 * loss / shares[d]
    now = exploration(STEPS, k)
    shares = softmax([exploration(STEPS - 1, k) * reward for reward in rewards])
    return taught(built("odm", k, alpha=0.6), k).mix(None, STEPS), [(1 - k * now) * share + now for share in shares]


def odm_official(k: int) -> tuple[Any, Any]:
    rewards = [0.0] * k
    for step in range(STEPS):
        for d, (loss, tokens) in enumerate(zip(*losses_of(step, k), strict=True)):
            if tokens:
                rewards[d] = 0.6 * rewards[d] + 0.4 * math.exp(loss)
    now = exploration(9, k)
    want = [(1 - k * now) * reward / sum(rewards) + now for reward in rewards]
    return taught(built("odm", k, alpha=0.6, variant="official"), k).mix(None, 9), want


def _doremi(k: int, variant: str) -> tuple[Any, Any]:
    initial = mixture(k).proportions.tolist()
    official = variant == "official"
    weights = initial if official else [1 / k] * k
    excess, total = [math.log(VOCABULARY) if official else 0.0] * k, [0.0] * k
    for step in range(STEPS):
        losses, tokens = losses_of(step, k)
        excess = [loss if count else old for loss, count, old in zip(losses, tokens, excess, strict=True)]
        moved = softmax([math.log(w) + 0.7 * x for w, x in zip(weights, excess, strict=True)])
        weights = [0.9 * w + 0.1 / k for w in moved]
        total = [t + w for t, w in zip(total, weights, strict=True)]
    mixer = taught(built("doremi", k, reweight_eta=0.7, reweight_eps=0.1, variant=variant), k)
    np.testing.assert_allclose(mixer.domain_weights(), weights, rtol=1e-12)
    np.testing.assert_allclose(mixer.average_weights(), [t / STEPS for t in total], rtol=1e-12)
    return mixer.mix(None, STEPS), initial


def doremi(k: int) -> tuple[Any, Any]:
    return _doremi(k, "paper")


def doremi_official(k: int) -> tuple[Any, Any]:
    return _doremi(k, "official")


def _dynamic_moe(k: int, variant: str) -> tuple[Any, Any]:
    layers, experts, eta, c = 3, 4, 2.0, 0.2
    loads = np.random.default_rng(k).dirichlet(np.ones(experts), (k, layers))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_moe_mixer, "expert_loads", lambda *_: loads)
        mixer = built("dynamic_moe", k, eta=eta, c=c, variant=variant)
        got = [mixer.mix(None, step) for step in range(2)][-1]
    seen = range(layers) if variant == "paper" else [layers - 1]
    distance = [
        sum(math.dist(loads[d, m], loads[j, m]) for j in range(k) for m in seen) / (k * len(seen)) for d in range(k)
    ]
    weights = mixture(k).proportions.tolist()
    if variant == "paper":
        weights = [(1 - c) * w + c / k for w in weights]
    for _ in range(2):
        moved = softmax([math.log(w) + eta * x for w, x in zip(weights, distance, strict=True)])
        weights = [(1 - c) * w + c / k for w in moved]
    return got, weights


def dynamic_moe(k: int) -> tuple[Any, Any]:
    return _dynamic_moe(k, "paper")


def dynamic_moe_official(k: int) -> tuple[Any, Any]:
    return _dynamic_moe(k, "official")


MIXERS: dict[str, Callable[[int], tuple[Any, Any]]] = {
    call.__name__: call
    for call in (
        *(random, static, stratified, temperature, odm, odm_official, doremi, doremi_official),
        *(dynamic_moe, dynamic_moe_official),
    )
}


@pytest.mark.parametrize("k", DOMAINS)
@pytest.mark.parametrize("name", MIXERS)
def test_proportions_of_one_to_five_domains(name: str, k: int) -> None:
    got, want = MIXERS[name](k)
    assert got.shape == (k,) and got.sum() == pytest.approx(1, abs=1e-12) and (got >= 0).all()
    if want is not None:
        np.testing.assert_allclose(got, want, rtol=1e-9)


def test_every_mixer_has_a_row() -> None:
    load_components()
    own = {n for n in REGISTRY.names("mixer") if REGISTRY.get("mixer", n).__module__.startswith("dataflex.")}
    assert own == {name.removesuffix("_official") for name in MIXERS}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.001, 1.0)), min_size=1, max_size=5),
    st.lists(st.integers(1, 11), min_size=1, max_size=40),
    st.integers(0, 2),
)
def test_draws_keep_the_proportions_in_each_phase_and_over_all(
    domains: list[tuple[int, float]], phases: list[int], seed: int
) -> None:
    sizes, shares = zip(*domains, strict=True)
    proportions = np.array(shares) / sum(shares)
    ids = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    manager = MixtureManager(ids, [f"d{i}" for i in range(len(sizes))], proportions, seed)
    seen = np.zeros(len(ids), dtype=np.int64)
    for phase, count in enumerate(phases):
        plan = manager.draw(proportions, count, phase)
        counts = np.bincount(ids[plan.sample_ids], minlength=len(sizes))
        assert counts.sum() == count and np.abs(counts - proportions * count).max() < 1
        np.testing.assert_allclose(plan.probabilities, (proportions / sizes)[ids[plan.sample_ids]])
        np.add.at(seen, plan.sample_ids, 1)
    drawn = np.bincount(ids, weights=seen, minlength=len(sizes))
    assert manager.drawn.tolist() == drawn.tolist()
    assert np.abs(drawn - proportions * sum(phases)).max() < 1.5
    for d in range(len(sizes)):
        assert np.ptp(seen[ids == d]) <= 1, "a sample comes again before the others of its domain came"


def test_a_share_below_one_sample_of_a_phase_comes_over_the_phases() -> None:
    proportions = np.array([0.9, 0.05, 0.03, 0.015, 0.005])
    manager = MixtureManager(np.repeat(np.arange(5), 1000), list("abcde"), proportions, 0)
    for phase in range(50):
        manager.draw(proportions, 4, phase)
        assert np.abs(manager.drawn - proportions * 4 * (phase + 1)).max() < 1
    assert manager.drawn.tolist() == [180, 10, 6, 3, 1]
