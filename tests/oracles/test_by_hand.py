"""What a run logs, evaluates, counts and trains, against float64 by hand: two ranks, accumulation, an odd target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.report.trainer_log import read_log
from tests.distributed import run_ranks
from tests.driver.workspace import make_model
from tests.oracles import by_hand, runs

# Letters of the answers; the lengths are far apart, so that no two means of losses are the same.
ANSWERS = {
    "a": [1, 30, 4, 12, 2, 21, 8],
    "b": [40, 3, 17, 1, 9, 26],
    "near": [2, 35, 5, 1],
    "far": [28, 3, 11],
}
POOL, BATCH, EVALUATED = 13, 4, (0, 4, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oracles")
    make_model(folder / "model")
    (folder / "data").mkdir()
    draw = np.random.default_rng(0)
    for name, lengths in ANSWERS.items():
        rows = [
            {"instruction": f"{name} {i}", "input": "", "output": "".join(draw.choice(list("abcdefgh"), n))}
            for i, n in enumerate(lengths)
        ]
        (folder / "data" / f"{name}.json").write_text(json.dumps(rows))
    info = {name: {"file_name": f"{name}.json"} for name in ANSWERS}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    (folder / "own_loss.py").write_text(runs.OWN_PART)
    return folder


Plans = dict[str, list[list[int]]]


@pytest.fixture(scope="module")
def plans(folder: Path) -> Plans:
    ranks: list[Plans] = run_ranks("tests.oracles.runs:run_all", 2, folder=str(folder))
    assert ranks[0] == ranks[1]
    return ranks[0]


@pytest.fixture(scope="module")
def figures(folder: Path, plans: Plans) -> by_hand.Figures:
    return by_hand.train(folder, plans["logged"], EVALUATED)


def of_log(folder: Path, key: str) -> dict[int, Any]:
    return {e["current_steps"]: e[key] for e in read_log(folder / "logged") if key in e}


def close(values: Any) -> Any:
    return pytest.approx(values, rel=2e-5)


def test_evaluations_are_means_over_the_tokens_of_all_and_of_each_domain(
    folder: Path, figures: by_hand.Figures
) -> None:
    for key in ("eval_loss", "eval_near_loss", "eval_far_loss"):
        assert of_log(folder, key) == close({step: figures.evaluations[step][key] for step in EVALUATED})
    means = figures.evaluations[0]
    assert means["eval_near_loss"] != close(means["eval_far_loss"])


def test_a_line_has_the_mean_loss_of_its_steps_and_the_norm_of_its_last(folder: Path, figures: by_hand.Figures) -> None:
    losses = figures.losses
    assert of_log(folder, "loss") == close({3: np.mean(losses[:3]), 6: np.mean(losses[3:6]), 8: np.mean(losses[6:])})
    assert of_log(folder, "grad_norm") == close({step: figures.norms[step - 1] for step in (3, 6, 8)})
    assert min(figures.norms) > by_hand.CLIP, "every step is clipped"


def test_a_line_has_the_rate_of_its_step_the_epoch_and_the_time(folder: Path, plans: Plans) -> None:
    assert len(plans["logged"]) == 8 and {len(ids) for ids in plans["logged"]} == {BATCH}
    assert of_log(folder, "lr") == close({step: by_hand.rate(step - 1) for step in (3, 6, 8)})
    assert of_log(folder, "epoch") == {3: 0.9231, 6: 1.8462, 8: 2.4615}
    assert of_log(folder, "percentage") == {3: 37.5, 6: 75.0, 8: 100.0}
    assert set(of_log(folder, "total_steps").values()) == {8}
    # 3 steps of 2 s, 3 evaluations of 3 s: before the first step, after the fourth and after the eighth.
    assert of_log(folder, "elapsed_time") == {3: "0:00:09", 6: "0:00:18", 8: "0:00:22"}
    assert of_log(folder, "remaining_time") == {3: "0:00:15", 6: "0:00:06", 8: "0:00:00"}


def test_the_results_are_of_all_steps(folder: Path, figures: by_hand.Figures) -> None:
    results = json.loads((folder / "logged/all_results.json").read_text())
    assert results["train_loss"] == close(np.mean(figures.losses))
    assert {key: results[key] for key in figures.evaluations[8]} == close(figures.evaluations[8])
    rates = {"train_runtime": 25.0, "train_samples_per_second": 32 / 25, "train_steps_per_second": 8 / 25}
    assert {key: results[key] for key in rates} == rates
    seconds = {"training": 16.0, "selection": 0.0, "evaluate": 9.0, "save": 0.0, "decide": 0.0, "score": 0.0}
    assert {part: results[f"{part}_seconds"] for part in seconds} == seconds
    assert results["epoch"] == 2.4615


def test_domains_are_counted_by_samples_and_tokens(folder: Path, plans: Plans) -> None:
    lines = [json.loads(line) for line in (folder / "logged/static_weights.jsonl").read_text().splitlines()]
    pool = by_hand.samples(folder, ("a", "b"))
    seen = [pool[i] for ids in plans["logged"] for i in ids]
    assert lines[-1]["step"] == 8
    for name, size in (("a", 7), ("b", 6)):
        mine = [sample for sample in seen if sample.domain == name]
        assert len(mine) == lines[-1]["samples"][name] == 16
        assert lines[-1]["tokens"][name] == sum(len(sample.ids) for sample in mine)
        assert lines[-1]["epochs"][name] == round(16 / size, 4)


def test_the_weights_are_those_of_the_run_by_hand(folder: Path, figures: by_hand.Figures) -> None:
    check_weights(folder / "logged", figures.model, 2e-4 * by_hand.RATE * by_hand.STEPS)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_weighters_own_loss_is_the_mean_over_micro_batches(folder: Path, plans: Plans, stage: int) -> None:
    name = f"own loss z{stage}"
    right = by_hand.train_on_own_loss(folder, plans[name], 2, runs.LR)
    log = [e for e in read_log(folder / name) if "loss" in e]
    assert [e["loss"] for e in log] == close(right.losses)
    if stage:  # DeepSpeed tells none without ZeRO in fp32
        assert [e["grad_norm"] for e in log] == close(right.norms)
    check_weights(folder / name, right.model, 1e-6)


def check_weights(exported: Path, right: Any, tolerance: float) -> None:
    """The exported weights are ``right``'s to ``tolerance``, and moved by far more than that."""
    found, start = by_hand.load(exported), by_hand.load(exported.parent / "model")
    for (name, mine), other, before in zip(
        found.named_parameters(), right.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance, msg=lambda text, at=name: f"{at}: {text}")
        assert (mine - before).abs().max() > 30 * tolerance, name
