"""Mixers without an engine: formulas, planted truths, wrong params, and what the planner says and counts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.core.plan import decision_schedule
from dataflex.data.encoding.collate import Collator
from dataflex.data.pool import Pool
from dataflex.engine.models.reference import open_reference
from dataflex.scoring.passes.router_pass import expert_loads
from dataflex.scoring.scorer import Scorer
from dataflex.train.mixer.doremi_mixer import DoremiMixer, updated_weights
from dataflex.train.mixer.dynamic_moe_mixer import DynamicMoeMixer, domain_order, mean_distances
from dataflex.train.mixer.mixture import MixtureManager
from dataflex.train.mixer.odm_mixer import OdmMixer, exploration, official_policy, official_rewards, policy
from dataflex.train.mixer.static_mixer import TemperatureMixer
from dataflex.train.trainer.mix_trainer import MixPlanner, mix_planner
from dataflex.utils.errors import UserError
from tests.tiny import tiny_llama, tiny_mixtral
from tests.train.test_planners import make_run, plans


def manager(sizes: list[int], shares: list[float] | None = None) -> MixtureManager:
    k = len(sizes)
    names = [f"d{i}" for i in range(k)]
    return MixtureManager(np.repeat(np.arange(k), sizes), names, np.array(shares or [1 / k] * k), 7)


def test_temperature_goes_from_equal_shares_to_shares_by_size() -> None:
    mixture = manager([1, 4, 16])
    for tau, want in ((0.0, [1, 1, 1]), (0.5, [1, 2, 4]), (1.0, [1, 4, 16])):
        np.testing.assert_allclose(TemperatureMixer(mixture, tau).mix(None, 0), np.array(want) / sum(want))
    assert TemperatureMixer(manager([0, 5, 5]), 0.0).mix(None, 0).tolist() == [0.0, 0.5, 0.5]


def test_odm_finds_the_best_arm_of_forty_and_keeps_all_apart() -> None:
    """Arm 17's loss stays high; the others' differ a little. Batches of 32, a decision at each step, with noise."""
    mixture = manager([1000] * 40)
    mixer, draw = OdmMixer(mixture), np.random.default_rng(0)
    domain_of = np.repeat(np.arange(40), 1000)
    means = 2.0 + 0.02 * np.arange(40)
    means[17] = 6.0
    for step in range(600):
        shares = mixer.mix(None, step)
        tokens = 100.0 * np.bincount(domain_of[mixture.draw(shares, 32, step).sample_ids], minlength=40)
        mixer.learn(tokens * (means + 0.1 * draw.standard_normal(40)), tokens)
    shares = mixer.mix(None, 600)
    assert shares.argmax() == 17 and shares[17] > 1.4 * np.delete(shares, 17).max()
    assert len(np.unique(shares.round(6))) == 40 and shares.min() > 0.5 / 40
    assert shares.sum() == pytest.approx(1)


def test_official_odm_stays_with_the_worse_domain_where_the_papers_goes_back_to_equal_shares() -> None:
    """Planted: losses of 3 and 2, 2, 2 for 10,000 steps. The authors' ends at e^3 / (e^3 + 3 e^2) = 0.475."""
    found = {}
    for variant in ("paper", "official"):
        mixture = manager([100] * 4)
        mixer, losses = OdmMixer(mixture, variant=variant), np.array([3.0, 2.0, 2.0, 2.0])
        for step in range(1, 10_001):
            mixer.learn(losses, np.ones(4))
            mixture.proportions = mixer.mix(None, step)
        found[variant] = mixture.proportions
        assert mixture.proportions.sum() == pytest.approx(1)
    epsilon = np.sqrt(np.log(4) / (4 * 10_000))
    want = np.array([np.e, 1, 1, 1]) / (np.e + 3)
    np.testing.assert_allclose(found["official"], (1 - 4 * epsilon) * want + epsilon, rtol=1e-9)
    assert found["official"][0] > 0.46 and found["paper"][0] < 0.26


def test_official_odm_survives_losses_whose_exponential_does_not_fit() -> None:
    rewards = official_rewards(np.zeros(2), np.array([2000.0, 1.0]), np.array([True, True]), 0.9)
    np.testing.assert_allclose(official_policy(rewards, 10**6), [1, 0], atol=1e-3)


def test_odm_explores_less_with_time_and_one_domain_is_no_choice() -> None:
    assert [exploration(t, 4) for t in (0, 1)] == [0.25, 0.25]
    assert exploration(100, 4) == pytest.approx(np.sqrt(np.log(4) / 400))
    assert policy(np.array([3.0]), 5).tolist() == [1.0]
    assert np.isfinite(policy(np.array([1e6, 0.0]), 10)).all()


def test_doremi_keeps_small_weights_positive_and_finite() -> None:
    moved = updated_weights(np.array([1e-300, 1.0]), np.array([0.0, 500.0]), 1.0, 0.01)
    np.testing.assert_allclose(moved, [0.005, 0.995])


MOE = {"num_hidden_layers": 2, "num_experts_per_tok": 1, "num_local_experts": 4}


def routed_by_token(**overrides: Any) -> Any:
    """A Mixtral that sends token t to expert t mod 4 in every layer: attention and experts add nothing."""
    net = tiny_mixtral(64, **MOE, **overrides)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        kinds = torch.arange(64) % 4
        net.model.embed_tokens.weight.zero_()
        net.model.embed_tokens.weight[torch.arange(64), kinds] = 1.0
        for layer in net.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[torch.arange(4), torch.arange(4)] = 1.0
    return net


def moe_mixer(
    domains: dict[str, list[list[int]]], packing: bool = False, shares: Any = None, **params: Any
) -> DynamicMoeMixer:
    pool = Pool.from_datasets({n: [{"input_ids": r, "labels": r} for r in rows] for n, rows in domains.items()})
    engine = SimpleNamespace(module=routed_by_token(), device="cpu", empty_partition_cache=lambda: None)
    scorer: Any = Scorer(engine, Collator(0, packing=packing, cutoff_len=24), 40, lambda names: ({}, None))  # type: ignore[arg-type, return-value]
    shares = np.full(len(domains), 1 / len(domains)) if shares is None else shares
    mixture = MixtureManager(pool.domain_ids, pool.domain_names, shares, 0)
    return DynamicMoeMixer(mixture, pool, scorer, **params)


@pytest.mark.parametrize("packing", [False, True])
def test_dynamic_moe_raises_the_domain_with_experts_of_its_own(packing: bool) -> None:
    """Domains 'even' and 'also' use experts 0 and 2, 'odd' uses 1 and 3; the pad token 0 would count for expert 0."""
    draw = np.random.default_rng(0)
    rows = [(2 * draw.integers(1, 31, size=draw.integers(3, 12))).tolist() for _ in range(16)]
    odd = [[t + 1 for t in row] for row in rows[:9]]
    mixer = moe_mixer({"even": rows[:8], "also": rows[8:], "odd": odd}, packing, eta=1.0, c=0.1)
    loads = expert_loads(mixer.scorer, mixer.pool, mixer.ids, mixer.domain_of[mixer.pool.domain_ids], 3)
    tokens = [np.array(sum(part, [])) % 4 for part in (rows[:8], rows[8:], odd)]
    want = np.array([np.bincount(t, minlength=4) / len(t) for t in tokens])
    np.testing.assert_allclose(loads, np.repeat(want[:, None], 2, axis=1))
    shares = mixer.mix(None, 0)
    pairs = np.array([[np.linalg.norm(a - b) for b in want] for a in want]).mean(axis=1)
    by_hand = np.exp(pairs) / np.exp(pairs).sum() * 0.9 + 0.1 / 3
    np.testing.assert_allclose(shares, by_hand)
    assert shares.argmax() == 2
    np.testing.assert_allclose(mean_distances(loads), pairs)


def test_the_official_dynamic_moe_looks_at_the_last_layer_only() -> None:
    """In the first layer each domain has an expert of its own; in the last 'even' and 'also' share one."""
    draw = np.random.default_rng(0)
    rows = [(4 * draw.integers(1, 15, size=6)).tolist() for _ in range(4)]
    domains = {"even": rows[:2], "also": [[t + 2 for t in row] for row in rows[2:]], "odd": [[t + 1 for t in rows[0]]]}
    start, shares = np.array([0.6, 0.3, 0.1]), {}
    for variant in ("paper", "official"):
        mixer = moe_mixer(domains, eta=1.0, c=0.1, variant=variant, shares=start)
        with torch.no_grad():
            gate = mixer.scorer.engine.module.model.layers[-1].mlp.gate.weight
            gate.zero_()
            gate[0, [0, 2]] = gate[1, [1, 3]] = 1.0
        shares[variant] = mixer.mix(None, 0)
    first = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]])
    last = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]])
    deltas = [np.array([[np.linalg.norm(a - b) for b in loads] for a in loads]).mean(axis=1) for loads in (first, last)]
    assert np.ptp(deltas[0]) < 1e-12, "the first layer alone tells the domains apart evenly"
    for variant, delta, begin in (
        ("paper", np.mean(deltas, axis=0), 0.9 * start + 0.1 / 3),
        ("official", deltas[1], start),
    ):
        moved = begin * np.exp(delta)
        np.testing.assert_allclose(shares[variant], 0.9 * moved / moved.sum() + 0.1 / 3, err_msg=variant)


def test_dynamic_moe_looks_at_a_fixed_part_of_every_domain() -> None:
    mixer = moe_mixer({"a": [[2, 3, 4]] * 9, "b": [[5, 6]] * 4}, eval_samples=5)
    assert np.bincount(mixer.pool.domain_ids[mixer.ids]).tolist() == [5, 4]
    assert np.array_equal(mixer.ids, moe_mixer({"a": [[2, 3, 4]] * 9, "b": [[5, 6]] * 4}, eval_samples=5).ids)


def test_evaluation_domains_are_matched_by_name_or_by_order() -> None:
    assert domain_order(["b", "a"], ["a", "b"]).tolist() == [1, 0]
    assert domain_order(["a_eval", "b_eval"], ["a", "b"]).tolist() == [0, 1]
    with pytest.raises(UserError, match="expected one dataset for each of a, b, in this order; got a"):
        domain_order(["a"], ["a", "b"])


DENSE = SimpleNamespace(engine=SimpleNamespace(module=tiny_llama()))
POOL = SimpleNamespace(domain_ids=np.array([0]), domain_names=["d0"])


def doremi(**params: Any) -> DoremiMixer:
    return DoremiMixer(manager([3]), DENSE, lambda path: lambda micro: torch.zeros(1), **params)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: doremi(), "doremi mixer: reference_model_path: missing"),
        (lambda: doremi(reference_model_path="x", reweight_eta=0.0), "reweight_eta: must be > 0, got 0.0"),
        (
            lambda: doremi(reference_model_path="x", reweight_eps=1.0),
            "reweight_eps: expected a number from 0 to below 1",
        ),
        (
            lambda: doremi(reference_model_path="x", variant="oficial"),
            r"variant: 'oficial' \(did you mean 'official'\?\)",
        ),
        (
            lambda: OdmMixer(manager([3]), variant="ofical"),
            r"odm mixer: variant: 'ofical' \(did you mean 'official'\?\)",
        ),
        (
            lambda: DynamicMoeMixer(manager([3]), POOL, DENSE, variant="x"),
            "dynamic_moe mixer: variant: 'x'; valid: paper, official",
        ),
        (lambda: OdmMixer(manager([3]), alpha=1.0), "odm mixer: alpha: expected a number from 0 to below 1, got 1.0"),
        (lambda: TemperatureMixer(manager([3]), -1), "temperature mixer: tau: expected a number >= 0, got -1"),
        (lambda: DynamicMoeMixer(manager([3]), POOL, DENSE), "dynamic_moe mixer: a llama model has no experts"),
        (
            lambda: open_reference("no/such", engine=None, pool=None, model=None, open_head=None),  # type: ignore[arg-type]
            "reference_model_path: there is no folder 'no/such'",
        ),
    ],
)
def test_wrong_params_are_named(make: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        make()


def test_the_official_doremi_starts_at_the_log_of_the_vocabulary_and_at_the_sampling_proportions() -> None:
    paper, official = (
        DoremiMixer(manager([3, 3], [0.8, 0.2]), DENSE, lambda path: lambda micro: torch.zeros(1), "x", variant=variant)
        for variant in ("paper", "official")
    )
    assert paper.excess.tolist() == [0.0, 0.0] and paper.weights.tolist() == [0.5, 0.5]
    assert official.excess.tolist() == [pytest.approx(np.log(259))] * 2 and official.weights.tolist() == [0.8, 0.2]


def test_the_planner_counts_and_warns_once_of_a_domain_that_repeats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Domains of 5, 30 and 15 samples; 44 samples at equal shares go over the first 2.9 times."""
    run = make_run(output_dir=tmp_path)
    mixture = MixtureManager(run.pool.domain_ids, run.pool.domain_names, np.full(3, 1 / 3), 3)
    planner = MixPlanner(mixture, None, "static", None, most_epochs=2.0)
    plans(planner, run, trained=True)
    planner.on_train_end(run)
    lines = [json.loads(line) for line in (tmp_path / "static_weights.jsonl").read_text().splitlines()]
    assert [sum(line["samples"].values()) for line in lines] == [0, 8, 20, 32, 44]
    assert lines[-1]["tokens"] == lines[-1]["samples"], "each sample of this pool has one token"
    assert lines[-1]["epochs"]["maths"] == pytest.approx(lines[-1]["samples"]["maths"] / 5)
    said = capsys.readouterr().err
    assert said.count("domain 'maths' is gone over more than 2 times") == 1 and "'dates' is gone" not in said


def test_deciding_at_every_step_is_said_when_something_moves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = decision_schedule(warmup_step=0, update_step=1, update_times=30, train_step=None, epoch_steps=1)
    run = make_run(schedule, output_dir=tmp_path)
    mixture = MixtureManager(run.pool.domain_ids, run.pool.domain_names, np.full(3, 1 / 3), 3)
    planner = mix_planner(mixture, OdmMixer(mixture), "odm", None, 100.0)
    plans(planner, run)
    lines = (tmp_path / "odm_weights.jsonl").read_text().splitlines()
    assert len(lines) == 30 and not (tmp_path / "decisions").exists()
    assert capsys.readouterr().err.count("odm mixes") == 1
