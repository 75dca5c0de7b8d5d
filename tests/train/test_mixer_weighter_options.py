"""Every param of every mixer and weighter does what it says, and so does every preset of weighted draws."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.config.sections.weighting import PRESETS, WeightingSection
from dataflex.data.pool import Pool
from dataflex.ops.losses.token_rules import TokenRows
from dataflex.train.mixer.dynamic_moe_mixer import sampled
from dataflex.train.weighter import adapt_weighter
from dataflex.train.weighter.adapt_weighter import AdaptWeighter
from dataflex.train.weighter.custom_weighter import CustomWeighter
from dataflex.train.weighter.eaft_weighter import EaftWeighter
from dataflex.train.weighter.loss_weighter import LossWeighter
from dataflex.train.weighter.rho_weighter import RhoWeighter
from dataflex.train.weighter.static_weights import draw_probabilities
from dataflex.utils.errors import UserError
from tests.train.options import OPTIONS, all_params, option
from tests.train.test_domain_counts import MIXERS, STEPS, built, mixture, taught


@option("mixer", "random", "seed")
def test_random_proportions_are_of_seed_and_step() -> None:
    found = {
        (seed, step): tuple(built("random", 3, seed=seed).mix(None, step)) for seed in range(3) for step in range(3)
    }
    assert len(set(found.values())) == 9 and found[1, 2] == tuple(built("random", 3, seed=1).mix(None, 2))


@option("mixer", "static", "proportions")
def test_static_proportions_are_those_given_or_the_initial_ones() -> None:
    np.testing.assert_allclose(built("static", 3, proportions=[1, 2, 5]).mix(None, 0), [0.125, 0.25, 0.625])
    np.testing.assert_allclose(built("static", 3).mix(None, 0), mixture(3).initial_proportions)


@option("mixer", "temperature", "tau")
def test_tau_goes_from_equal_shares_to_those_by_size() -> None:
    sizes = np.array([7.0, 40.0, 3.0])
    for tau in (0.0, 0.5, 1.0, 2.0):
        np.testing.assert_allclose(built("temperature", 3, tau=tau).mix(None, 0), sizes**tau / (sizes**tau).sum())


@option("mixer", "odm", "alpha", "variant")
def test_alpha_is_what_the_rewards_keep() -> None:
    """One domain's loss is 1 and then 3: the reward is (1 - alpha) (alpha + 3), of exp(loss) in the other variant."""
    for alpha in (0.0, 0.5, 0.9):
        for variant, risen in (("paper", lambda x: x), ("official", math.exp)):
            mixer = built("odm", 1, alpha=alpha, variant=variant)
            for loss in (1.0, 3.0):
                mixer.learn(np.array([loss * 5]), np.array([5.0]))
            assert mixer.rewards[0] == pytest.approx((1 - alpha) * (alpha * risen(1.0) + risen(3.0)))
            assert mixer.learns_in_warmup == (variant == "paper")


@option("mixer", "doremi", "reweight_eta", "reweight_eps", "variant")
def test_the_step_and_the_smoothing_of_doremi() -> None:
    excess = np.array([0.5, 1.5])
    for eta, eps in ((1.0, 0.0), (0.25, 0.0), (1.0, 0.5)):
        for variant, begin in (("paper", np.array([0.5, 0.5])), ("official", mixture(2).initial_proportions)):
            mixer = built("doremi", 2, reweight_eta=eta, reweight_eps=eps, variant=variant)
            np.testing.assert_allclose(mixer.domain_weights(), begin)
            mixer.learn(excess * 8, np.array([8.0, 8.0]))
            moved = begin * np.exp(eta * excess)
            np.testing.assert_allclose(mixer.domain_weights(), (1 - eps) * moved / moved.sum() + eps / 2)
            assert mixer.weighted_mean == (variant == "official")
    assert taught(built("doremi", 3), 3).steps == STEPS


@option("mixer", "dynamic_moe", "eta", "c", "variant")
def test_the_step_and_the_smoothing_of_dynamic_moe() -> None:
    """The formulas of `test_domain_counts` have other values than the defaults, of which a mixer is not built there."""
    usual = built("dynamic_moe", 3)
    assert (usual.eta, usual.c) == (10.0, 0.05)
    for name in ("dynamic_moe", "dynamic_moe_official"):
        got, want = MIXERS[name](3)
        np.testing.assert_allclose(got, want)


@option("mixer", "dynamic_moe", "eval_samples", "seed")
def test_the_samples_that_dynamic_moe_looks_at() -> None:
    domains = np.repeat([0, 1, 2], [7, 40, 3])
    for most in (1, 5, 1000):
        mixer = built("dynamic_moe", 3, eval_samples=most)
        assert np.bincount(domains[mixer.ids]).tolist() == [min(most, size) for size in (7, 40, 3)]
    ids = [tuple(built("dynamic_moe", 3, eval_samples=5, seed=seed).ids) for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]
    assert sorted(sampled(domains, 99, 0)) == list(range(50))


def weights(
    step: int, losses: Any = (1.0, 2.0, 4.0, 3.0), total: int = 21, warmup: int = 1, **params: Any
) -> list[float]:
    weighter = LossWeighter(**params)
    weighter.warmup_step = warmup
    ctx = SimpleNamespace(step=step, total_steps=total)
    return weighter.sample_weights(torch.tensor(losses), ctx=ctx, model=None, inputs=None).tolist()


@option("weighter", "loss", "strategy", "delta")
def test_the_shapes_of_the_loss_weights() -> None:
    """Losses 1, 2, 4, 3 lie at -1, -1/3, 1, 1/3 of delta."""
    for delta in (1.0, 2.0):
        at = np.array([-1, -1 / 3, 1, 1 / 3]) * delta
        shapes = {
            "linupper": np.minimum(at + delta, delta),
            "quadratic": 1 - (at / delta) ** 2,
            "extremes": np.abs(at),
            "uniform": np.zeros(4),
        }
        for strategy, shape in shapes.items():
            powers = np.exp(shape / 0.5)
            found = weights(1, strategy=strategy, delta=delta, r_start=0.5, r_end=0.5)
            np.testing.assert_allclose(found, 4 * powers / powers.sum(), rtol=1e-5)


@option("weighter", "loss", "r_start", "r_end")
def test_the_temperature_goes_from_the_first_weighted_step_to_the_end() -> None:
    for step, r in ((1, 3.0), (6, 2.5), (11, 2.0), (21, 1.0), (30, 1.0)):
        powers = np.exp(np.array([0, 2 / 3, 1, 1]) / r)
        found = weights(step, strategy="linupper", r_start=3.0, r_end=1.0)
        np.testing.assert_allclose(found, 4 * powers / powers.sum(), rtol=1e-5)


ANCHORS = np.float32([[1, 0], [0, 1], [3, 4], [-1, 0]])
STATES = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-3.0, 4.0]])
# Cosines of STATES to ANCHORS.
COSINES = np.array([[1, 0, 0.6, -1], [0, 1, 0.8, 0], [-0.6, 0.8, 0.28, 0.6]])


def adapt(
    steps: tuple[int, ...] = (1,), losses: int = 3, **params: Any
) -> tuple[np.ndarray, list[tuple[list[int], str]], AdaptWeighter]:
    """Weights of planted states against planted anchors, and which anchors were embedded how."""
    asked: list[tuple[list[int], str]] = []

    def embeddings(scorer: Any, dataset: Any, ids: Any, *, pooling: str) -> np.ndarray:
        asked.append((ids.tolist(), pooling))
        return ANCHORS[ids]

    scorer: Any = SimpleNamespace(engine=SimpleNamespace(module=None), device="cpu")
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt_weighter, "embeddings", embeddings)
        patch.setattr(adapt_weighter, "LastHidden", lambda module: SimpleNamespace(take=lambda: STATES[None]))
        patch.setattr(adapt_weighter, "counted_positions", lambda *given: seen.append(given[-1]))
        patch.setattr(adapt_weighter, "pooled", lambda hidden, real, cu, pooling: (seen.append(pooling), hidden)[1])
        weighter = AdaptWeighter(range(4), scorer, **params)
        for step in steps:
            weighter.before_step(SimpleNamespace(step=step))
        inputs = {"cu_seqlens": None, "labels": torch.zeros(1, 3, dtype=torch.int64), "lengths": None}
        found = weighter.sample_weights(torch.zeros(losses), ctx=None, model=None, inputs=inputs)
    assert set(seen) == {weighter.pooling} == {pooling for _, pooling in asked}
    return found.numpy(), asked, weighter


@option("weighter", "adapt", "weight", "similarity", "temperature")
def test_the_forms_of_adapts_weights() -> None:
    scores = {"mean": COSINES.mean(1), "max": COSINES.max(1)}
    for similarity, s in scores.items():
        for temperature in (1.0, 0.2):
            params: dict[str, Any] = {"similarity": similarity, "temperature": temperature, "num_anchors": "all"}
            found, *_ = adapt(weight="sigmoid", **params)
            np.testing.assert_allclose(found, 1 / (1 + np.exp(-s / temperature)), rtol=1e-5)
            powers = np.exp(s / temperature)
            found, *_ = adapt(weight="softmax", **params)
            np.testing.assert_allclose(found, 3 * powers / powers.sum(), rtol=1e-5)
    for weight, relative in (("sigmoid", False), ("softmax", True)):
        assert adapt(weight=weight)[2].relative == relative


@option("weighter", "adapt", "pooling", "num_anchors", "refresh_step", "seed")
def test_the_anchors_of_adapt() -> None:
    for pooling in ("weighted", "mean", "last", "trained"):
        assert adapt(pooling=pooling)[1] == [([0, 1, 2, 3], pooling)]
    drawn = [tuple(adapt(num_anchors=2, seed=seed)[1][0][0]) for seed in range(12)]
    assert all(len(set(ids)) == 2 for ids in drawn) and len(set(drawn)) > 2
    assert drawn[3] == tuple(adapt(num_anchors=2, seed=3)[1][0][0])
    for refresh, want in ((1, 7), (2, 4), (3, 3), (50, 1)):
        assert len(adapt(tuple(range(1, 8)), refresh_step=refresh)[1]) == want


@option("weighter", "custom", "strategy")
def test_the_custom_weighter_is_the_mean() -> None:
    assert CustomWeighter("uniform").get_weighted_loss(torch.tensor([1.0, 2.0, 6.0])) == 3.0
    with pytest.raises(UserError, match="custom weighter: strategy: 'other'; valid: uniform"):
        CustomWeighter("other")


@option("weighter", "eaft", "alpha", "top")
def test_doubt_is_of_the_largest_and_to_a_power() -> None:
    """Of the logits ln 4, ln 2, ln 2, 0 the largest two have shares of 2/3 and 1/3, the largest three 1/2, 1/4, 1/4."""
    logits = torch.tensor([[4.0, 2.0, 2.0, 1.0]], dtype=torch.float64).log()
    rows = TokenRows(logits, torch.tensor([0]), logits.logsumexp(1))
    for top, entropy in ((2, math.log(3) - 2 / 3 * math.log(2)), (3, 1.5 * math.log(2))):
        for alpha in (0.5, 1.0, 2.0):
            found = EaftWeighter(alpha=alpha, top=top).of_logits(rows)
            assert float(found) == pytest.approx((entropy / 3) ** alpha)


@option("weighter", "rho", "share")
def test_the_share_of_tokens_that_count() -> None:
    """The excess losses are 4, 3, 2, 1 and 0, the sixth token has no label: the largest count, the mean weight is 1."""
    reference = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 9.0]])
    losses = torch.tensor([[5.0, 4.0, 3.0], [2.0, 1.0, 0.0]])
    micro = SimpleNamespace(labels=torch.tensor([[1, 1, 1], [1, 1, -100]]))
    for share, weights in ((0.2, [5, 0, 0, 0, 0, 0]), (0.6, [5 / 3, 5 / 3, 5 / 3, 0, 0, 0]), (1.0, [1, 1, 1, 1, 1, 0])):
        weighter = RhoWeighter(lambda path: lambda micro: reference, reference_model_path="r", share=share)
        torch.testing.assert_close(weighter.among(losses, micro).flatten(), torch.tensor(weights, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["mixer", "weighter"])
def test_every_param_has_a_row(kind: str) -> None:
    missing = {("mixer", "doremi", "reference_model_path")}  # a runtime object: test_mixer_trajectories.py
    assert {row for row in OPTIONS if row[0] == kind} == all_params(kind) - missing, "write a test with @option"


def answered(prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def draws(**keys: Any) -> list[float]:
    """Probabilities of samples that differ in prompt, in answer, in its second token only, and in its order."""
    pools = {
        "a": [answered([3, 4], [7, 8]), answered([5], [7, 8]), answered([6, 6, 6], [7, 8]), answered([3, 4], [7, 9])],
        "b": [answered([3, 4], [8, 7]), answered([3], [7, 8, 7])],
    }
    return draw_probabilities(WeightingSection(**keys), Pool.from_datasets(pools)).tolist()


def test_presets_of_weighted_draws() -> None:
    """By hand: the classes are 3, 1, 1 and 1 samples large, the domains 4 and 2."""
    by_size = np.array([4, 4, 4, 4, 2, 2])
    want = {
        "inverse_class": [1 / 12] * 3 + [1 / 4] * 3,
        "inverse_domain": 1 / (2 * by_size),
    }
    for preset, probabilities in want.items():
        np.testing.assert_allclose(draws(sampling=preset), probabilities)
    for temperature in (0.0, 0.5, 1.0):
        shares = by_size ** (temperature - 1.0)
        np.testing.assert_allclose(
            draws(sampling="temperature", sampling_temperature=temperature), shares / shares.sum()
        )
    assert {*want, "temperature"} == set(PRESETS), "a preset without a row"
