"""The weights of doremi and odm, step for step, against a float64 computation from every token that was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.distributed import run_ranks
from tests.train.mixing_runs import ALPHA, BATCH, ETA, GAS, SHARES, SIZES, SMOOTHING, STEPS, WARMUP

K = len(SIZES)
EVERY = [(gas, world) for world, of in GAS.items() for gas in of]
DOREMI = [f"doremi {kind} {gas}" for kind in ("reference", "store") for gas in (1, 2)]
ODM = [f"odm {update} {gas}" for update in (1, 3) for gas in (1, 2)]

OFFICIAL = [f"{mixer} official {gas}" for mixer in ("doremi", "odm") for gas in (1, 2)]


def named(names: list[str]) -> list[tuple[str, int]]:
    """Each run on as many ranks as make it."""
    return [(name, world) for gas, world in EVERY for name in names if name.endswith(f" {gas}")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, list[dict[str, Any]]]]:
    """{world size: each rank's runs}."""
    target = "tests.train.mixing_runs:every_run"
    yield {
        world: run_ranks(target, world, folder=str(tmp_path_factory.mktemp(f"mixing{world}")), world=world)
        for world in (1, 2)
    }


def tokens_of(ranks: list[dict[str, Any]], name: str, step: int) -> np.ndarray:
    """All ranks' rows (sample, domain, loss, reference loss) of a step's global batch."""
    rows = [row for rank in ranks for row in rank[name][step]["tokens"]]
    assert sorted({int(row[0]) for row in rows}) == sorted(set(ranks[0][name][step]["ids"]))
    return np.array(rows, dtype=np.float64)


def doremi_by_hand(ranks: list[dict[str, Any]], name: str) -> tuple[list[np.ndarray], list[float]]:
    """Algorithm 1 written out: the weights after each step, and the loss that each step is trained with."""
    gas = int(name[-1])
    alpha, excess = np.ones(K) / K, np.zeros(K)
    weights, losses = [], []
    for step in range(STEPS):
        rows = tokens_of(ranks, name, step)
        before = alpha
        if step >= WARMUP:
            for d in range(K):
                mine = rows[rows[:, 1] == d]
                if len(mine):
                    excess[d] = np.mean([max(loss - reference, 0.0) for _, _, loss, reference in mine])
            alpha = alpha * np.exp(ETA * excess)
            alpha = (1 - SMOOTHING) * alpha / alpha.sum() + SMOOTHING / K
        used = alpha if gas == 1 else before
        total = 0.0
        for sample in ranks[0][name][step]["ids"]:
            mine = rows[rows[:, 0] == sample]
            factor = 1.0 if step < WARMUP else used[int(mine[0, 1])] / SHARES[int(mine[0, 1])]
            total += factor * mine[:, 2].mean() / BATCH
        weights.append(alpha)
        losses.append(total)
    return weights, losses


def odm_by_hand(ranks: list[dict[str, Any]], name: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Algorithm 1 written out: the rewards after each step, and the proportions that each step is sampled with."""
    update = int(name.split()[1])

    def epsilon(t: int) -> float:
        return 1 / K if t == 0 else min(1 / K, (np.log(K) / (K * t)) ** 0.5)

    rewards, shares = np.zeros(K), np.array(SHARES)
    found, proportions = [], []
    for step in range(STEPS):
        if step >= WARMUP and (step - WARMUP) % update == 0:
            scaled = np.exp(epsilon(step - 1) * rewards)
            shares = (1 - K * epsilon(step)) * scaled / scaled.sum() + epsilon(step)
        rows = tokens_of(ranks, name, step)
        rewards = rewards.copy()
        for d in range(K):
            mine = rows[rows[:, 1] == d]
            if len(mine):
                rewards[d] = ALPHA * rewards[d] + (1 - ALPHA) * mine[:, 2].mean() / shares[d]
        found.append(rewards)
        proportions.append(shares)
    return found, proportions


def official_doremi_by_hand(ranks: list[dict[str, Any]], gas: int) -> tuple[list[np.ndarray], list[float]]:
    """The authors' update written out, and their loss: in each micro-batch sum w l / sum w over its tokens.

    A micro-batch counts by its tokens; with one they are theirs exactly.
    """
    alpha, excess = np.array(SHARES), np.full(K, np.log(259))
    weights, losses = [], []
    for step in range(STEPS):
        rows = tokens_of(ranks, f"doremi official {gas}", step)
        before = alpha
        if step >= WARMUP:
            for d in range(K):
                mine = rows[rows[:, 1] == d]
                excess[d] = np.maximum(mine[:, 2] - mine[:, 3], 0.0).mean() if len(mine) else excess[d]
            alpha = alpha * np.exp(ETA * excess)
            alpha = (1 - SMOOTHING) * alpha / alpha.sum() + SMOOTHING / K
        used = np.array(SHARES) if step < WARMUP else alpha if gas == 1 else before
        total, ids = 0.0, ranks[0][f"doremi official {gas}"][step]["ids"]
        for part in np.split(np.array(ids), gas):
            of_sample = [rows[rows[:, 0] == i] for i in part]
            mine = np.concatenate([own[: len(own) // ids.count(i)] for i, own in zip(part, of_sample, strict=True)])
            w = (used / np.array(SHARES))[mine[:, 1].astype(int)]
            total += (w * mine[:, 2]).sum() / w.sum() * len(mine) / len(rows)
        weights.append(alpha)
        losses.append(total)
    return weights, losses


def official_odm_by_hand(ranks: list[dict[str, Any]], name: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The authors' group_update, one number at a time: nothing in the warm-up, and t is the number of the step."""
    rewards, shares = [0.0] * K, list(SHARES)
    found, proportions = [], []
    for step in range(STEPS):
        proportions.append(np.array(shares))
        rows = tokens_of(ranks, name, step)
        iteration = step + 1
        if iteration > WARMUP:
            epsilon = min(1 / K, (np.log(K) / (K * iteration)) ** 0.5)
            for d in set(rows[:, 1].astype(int)):
                rewards[d] = ALPHA * rewards[d] + (1 - ALPHA) * np.exp(rows[rows[:, 1] == d][:, 2].mean())
            shares = [(1 - K * epsilon) * r / sum(rewards) + epsilon for r in rewards]
        found.append(np.array(rewards))
    return found, proportions


@pytest.mark.parametrize(("gas", "world"), EVERY)
def test_official_doremi_divides_by_the_weights_of_the_tokens(gas: int, world: int, runs: Any) -> None:
    weights, losses = official_doremi_by_hand(runs[world], gas)
    for rank in runs[world]:
        steps = rank[f"doremi official {gas}"]
        np.testing.assert_allclose([s["state"] for s in steps], weights, rtol=0, atol=2e-6)
        np.testing.assert_allclose([s["loss"] for s in steps], losses, rtol=2e-6)
    paper = [s["loss"] for s in runs[world][0][f"doremi store {gas}"]]
    assert np.abs(np.array(paper) - losses)[WARMUP:].max() > 0.01, "the variants do not differ here"


@pytest.mark.parametrize(("gas", "world"), EVERY)
def test_official_odm_learns_and_samples_as_the_authors_code(gas: int, world: int, runs: Any) -> None:
    rewards, proportions = official_odm_by_hand(runs[world], f"odm official {gas}")
    assert np.ptp(proportions[-1]) > 0.005, "the run moves nothing, so that the test could not fail"
    for rank in runs[world]:
        np.testing.assert_allclose([s["state"] for s in rank[f"odm official {gas}"]], rewards, rtol=4e-6)
        np.testing.assert_allclose([s["proportions"] for s in rank[f"odm official {gas}"]], proportions, rtol=4e-6)


@pytest.mark.parametrize(("name", "world"), named(DOREMI))
def test_doremi_moves_and_uses_its_weights_as_the_paper_says(name: str, world: int, runs: Any) -> None:
    weights, losses = doremi_by_hand(runs[world], name)
    assert np.ptp(weights[-1]) > 0.1, "the run moves nothing, so that the test could not fail"
    for rank in runs[world]:
        np.testing.assert_allclose([s["state"] for s in rank[name]], weights, rtol=0, atol=2e-6)
        np.testing.assert_allclose([s["loss"] for s in rank[name]], losses, rtol=2e-6)
        np.testing.assert_allclose([s["proportions"] for s in rank[name]], [SHARES] * STEPS)


@pytest.mark.parametrize("gas", [1, 2])
def test_stored_reference_losses_are_those_of_the_model(gas: int, runs: Any) -> None:
    model, store = (runs[2][0][f"doremi {kind} {gas}"] for kind in ("reference", "store"))
    np.testing.assert_allclose([s["state"] for s in store], [s["state"] for s in model], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "world"), named(ODM))
def test_odm_learns_and_samples_as_the_paper_says(name: str, world: int, runs: Any) -> None:
    rewards, proportions = odm_by_hand(runs[world], name)
    assert np.ptp(proportions[-1]) > 0.005, "the run moves nothing, so that the test could not fail"
    for rank in runs[world]:
        np.testing.assert_allclose([s["state"] for s in rank[name]], rewards, rtol=2e-6)
        np.testing.assert_allclose([s["proportions"] for s in rank[name]], proportions, rtol=2e-6)


@pytest.mark.parametrize("name", [name for name, world in named([*DOREMI, *ODM, *OFFICIAL]) if world == 1])
def test_two_ranks_do_what_one_does(name: str, runs: Any) -> None:
    one, *two = (rank[name] for world in (1, 2) for rank in runs[world])
    for rank in two:
        assert [s["ids"] for s in rank] == [s["ids"] for s in one]
        for key in ("state", "proportions", "loss"):
            np.testing.assert_allclose([s[key] for s in rank], [s[key] for s in one], rtol=2e-5)


def test_doremi_raises_the_domain_with_the_largest_excess_loss(runs: Any) -> None:
    planted = runs[1][0]["planted"]
    lines, result = planted["lines"], planted["result"]
    assert [line["step"] for line in lines] == [0, *range(WARMUP, STEPS + 1)]
    steps = np.array([line["domain_weights"] for line in lines[2:]])
    assert (np.diff(steps[:, 1]) > 0).all() and (steps[:, 1] > steps[:, [0, 2]].max(axis=1)).all()
    assert result["domain_names"] == list(SIZES) and result["update_times"] == STEPS - WARMUP == len(steps)
    np.testing.assert_allclose(result["average_weights"], steps.mean(axis=0))
    assert planted["decisions"] == 0, "where every step decides, the jsonl is the record"


def test_the_weights_file_counts_samples_tokens_and_epochs(runs: Any) -> None:
    last = runs[1][0]["planted"]["lines"][-1]
    assert sum(last["samples"].values()) == STEPS * BATCH
    assert last["epochs"] == {n: round(last["samples"][n] / size, 4) for n, size in SIZES.items()}
    assert all(6 * last["samples"][n] <= last["tokens"][n] <= 24 * last["samples"][n] for n in SIZES)
