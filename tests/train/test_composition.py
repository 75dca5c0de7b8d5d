"""Selection, mixing and weighting at once: the mixer says how many of each domain, the selector which, the weighter
how much each counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dataflex
from dataflex.train.selector.base_selector import Selector
from dataflex.train.selector.random_selector import RandomSelector
from dataflex.train.trainer.select_trainer import SelectPlanner
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.distributed import run_ranks
from tests.train.test_planners import make_run

SIZES = {"short": 24, "long": 40}
WARMUP, UPDATE, TIMES, BATCH = 1, 3, 2, 4
COUNTS = [9, 3]
SELECTORS = ("less", "cluster_less", "loss", "random")


def build(folder: Path, world: int, selector: str) -> Any:
    components = folder / f"components_{os.environ['RANK']}.yaml"
    components.write_text(
        "selectors:\n  less: {params: {proj_dim: 64}}\n  cluster_less: {params: {proj_dim: 64, n_clusters: 9}}\n"
        "  loss: {params: {focus: high}}\n  random: {params: {}}\n"
        "mixers:\n  static: {params: {proportions: [3, 1]}}\nweighters:\n  loss: {params: {r_start: 1.0}}\n"
    )
    return dataflex.initialize(
        model=tiny.model("full", num_hidden_layers=1),
        config=tiny.ds_config(3, micro_batch=BATCH // world),
        dataflex={
            "train_type": ["dynamic_select", "dynamic_mix", "dynamic_weight"],
            "component_name": {"select": selector, "mix": "static", "weight": "loss"},
            "components_cfg_file": str(components),
            "output_dir": str(folder),
            "warmup_step": WARMUP,
            "update_step": UPDATE,
            "update_times": TIMES,
        },
        train_dataset={name: tiny.samples(size, seed=size) for name, size in SIZES.items()},
        eval_dataset=tiny.samples(3, seed=1),
        tokenizer=tiny.PadZero(),
    )


def run(folder: Path, world: int, selector: str) -> dict[str, Any]:
    """What was trained on, and on two ranks the losses of a resume in the middle of a phase."""
    engine = build(folder, world, selector)
    losses, ids = [], []
    for batch in engine.batches():
        losses.append(engine.training_step(batch))
        ids.append(batch.sample_ids.tolist())
        if engine.run.step == WARMUP + 2:
            engine.save_checkpoint(folder)
    decisions = [json.loads((folder / f"decisions/step_{step}.json").read_text()) for step in (WARMUP, WARMUP + UPDATE)]
    found = {"losses": losses, "ids": ids, "decisions": decisions}
    if world == 1:
        return found
    again = build(folder, world, selector)
    again.load_checkpoint(folder)
    tail = [again.training_step(batch) for batch in again.batches()]
    return found | {"tail": tail}


def everything(folder: str, world: int) -> dict[str, Any]:
    found = {}
    for selector in SELECTORS:
        place = Path(folder, selector)
        place.mkdir(exist_ok=True)
        found[selector] = run(place, world, selector)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    ranks = []
    for world in (1, 2):
        folder = str(tmp_path_factory.mktemp(f"composition{world}"))
        ranks += run_ranks("tests.train.test_composition:everything", world, folder=folder, world=world)
    return ranks


@pytest.mark.parametrize("selector", SELECTORS)
def test_the_mixer_counts_and_the_selector_picks(selector: str, results: list[dict[str, Any]]) -> None:
    domain = np.repeat([0, 1], list(SIZES.values()))
    for result in (rank[selector] for rank in results):
        for number, decision in enumerate(result["decisions"]):
            picks = decision["indices"]
            assert decision["mixer"] == "static" and decision["proportions"] == {"short": 0.75, "long": 0.25}
            assert np.bincount(domain[picks]).tolist() == COUNTS and len(set(picks)) == len(picks)
            first = WARMUP + number * UPDATE
            trained = [i for step in result["ids"][first : first + UPDATE] for i in step]
            assert sorted(trained) == sorted(picks)
    one, *two = (rank[selector] for rank in results)
    for other in two:
        assert other["tail"] == other["losses"][WARMUP + 2 :], "the resumed run's losses differ"
        assert other["ids"] == one["ids"]
        np.testing.assert_allclose(other["losses"], one["losses"], rtol=0, atol=1e-5)


def test_less_takes_the_best_of_each_domain(results: list[dict[str, Any]]) -> None:
    for decision in results[0]["less"]["decisions"]:
        scores = decision["metric"]["score"]
        for part in (scores[: COUNTS[0]], scores[COUNTS[0] :]):
            assert part == sorted(part, reverse=True)


def test_random_picks_as_many_of_each_domain_as_it_is_asked_for() -> None:
    pool = make_run().pool
    picks = RandomSelector(pool, None, None, "").select(None, 3, 7, domain_counts=np.array([2, 4, 1]))
    assert np.bincount(pool.domain_ids[picks]).tolist() == [2, 4, 1] and len(set(picks)) == 7


class Deaf(Selector):
    """Says that it heeds the counts, and does not."""

    takes_domain_counts = True

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        return list(range(num_samples))


def test_a_selector_that_does_not_heed_the_counts_is_found_out() -> None:
    run = make_run()
    phase = next(p for p in run.schedule.phases if p.decides)
    count = phase.steps * run.global_batch
    planner = SelectPlanner(Deaf(run.pool, None, None, None), "deaf")
    counts = np.zeros(len(run.pool.domain_names), dtype=np.int64)
    counts[-1] = count
    with pytest.raises(UserError, match="samples by domain, got|without replacement, it has"):
        planner.draw(run, phase, lambda asked: counts)
