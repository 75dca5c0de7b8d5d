"""Weighted training against float64 from scratch: weights step for step, gradients, sampling, resume, weights.jsonl."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.distributed import run_ranks
from tests.train import weighting_runs as runs


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """{world size: rank 0's results}."""
    found = {}
    for world in (1, 2):
        folder = str(tmp_path_factory.mktemp(f"weighting{world}"))
        found[world] = run_ranks("tests.train.weighting_runs:everything", world, folder=folder, world=world)[0]
    return found


@pytest.fixture(scope="module")
def references(results: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return {name: runs.reference(name, results[1]["trajectories"][name]["ids"]) for name in runs.WEIGHTERS}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", list(runs.WEIGHTERS))
def test_weights_follow_the_float64_run_step_for_step(
    results: dict[int, dict[str, Any]], references: dict[str, Any], name: str, world: int
) -> None:
    got = results[world]["trajectories"][name]
    assert got["ids"] == results[1]["trajectories"][name]["ids"]
    weights, losses = references[name]
    np.testing.assert_allclose(got["weights"], weights, rtol=2e-4, atol=0)
    np.testing.assert_allclose(got["losses"], losses, rtol=1e-5, atol=0)
    spread = np.ptp(np.array(got["weights"])[runs.WARMUP :], axis=1)
    assert (spread == 0).all() if name == "uniform" else (spread > 0.05).all(), "the case shows nothing"


@pytest.mark.parametrize("world", [1, 2])
def test_padding_of_packed_rows_has_no_part_in_a_representation(results: dict[int, dict[str, Any]], world: int) -> None:
    padded, packed = results[world]["packed"]
    np.testing.assert_allclose(packed, padded, rtol=1e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_are_those_of_explicit_weights(results: dict[int, dict[str, Any]], world: int) -> None:
    errors = results[world]["gradients"]
    assert len(errors) == 2 * len(runs.STATIC)
    assert not {case: error for case, error in errors.items() if error > 1e-6}


@pytest.mark.parametrize("world", [1, 2])
def test_uniform_is_bit_identical_to_unweighted(results: dict[int, dict[str, Any]], world: int) -> None:
    plain, uniform = results[world]["hashes"]
    assert plain == uniform


@pytest.mark.parametrize("place", [0, 1], ids=["with replacement", "without"])
def test_weighted_sampling_resumes_exactly_and_is_the_same_on_two_ranks(
    results: dict[int, dict[str, Any]], place: int
) -> None:
    one, two = (results[world]["resumed"][place] for world in (1, 2))
    for run in (one, two):
        assert run["tail"] == run["losses"][3:] and run["same"]
    assert one["ids"] == two["ids"]
    np.testing.assert_allclose(one["losses"], two["losses"], rtol=0, atol=1e-5)
    passes = np.array(one["ids"]).reshape(-1, 2 * runs.BATCH)
    distinct = [len(set(drawn)) for drawn in passes.tolist()]
    assert (max(distinct) < 2 * runs.BATCH) if place == 0 else distinct == [2 * runs.BATCH] * len(distinct)
    assert not {i for drawn in passes.tolist() for i in drawn} & set(range(0, 24, 5)), "samples of weight 0 were drawn"


def test_the_log_tells_of_the_weights_of_the_whole_step(results: dict[int, dict[str, Any]]) -> None:
    for world in (1, 2):
        lines = [json.loads(line) for line in results[world]["log"].splitlines()]
        run = results[world]["trajectories"]["linupper"]
        assert [line["step"] for line in lines] == [2, 4, 6]
        for line in lines:
            weights, ids = np.array(run["weights"][line["step"] - 1]), np.array(run["ids"][line["step"] - 1])
            check(line, weights)
            assert set(line["domains"]) == {"short", "long"}
            check(line["domains"]["short"], weights[ids < runs.SIZES["short"]])
            check(line["domains"]["long"], weights[ids >= runs.SIZES["short"]])


def check(line: dict[str, float], weights: np.ndarray) -> None:
    want = {
        "samples": len(weights),
        "min": weights.min(),
        "mean": weights.mean(),
        "max": weights.max(),
        "effective": weights.sum() ** 2 / (weights**2).sum(),
    }
    for key, value in want.items():
        assert line[key] == pytest.approx(value, rel=1e-6), key
