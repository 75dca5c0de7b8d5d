"""One row per registered component; tests/train/test_components.py runs each of them. A component needs a row."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.core.hook import Hook
from dataflex.utils import dist
from tests.tiny import byte_tokenizer, tiny_llama

WARMUP, UPDATE, TIMES, BATCH = 2, 3, 2, 4
SIZES = {"short": 24, "long": 40}
PICKED = UPDATE * BATCH


@dataclass(frozen=True)
class Outcome:
    """What a run of WARMUP + TIMES * UPDATE steps did.

    losses: of each step. phases: the sample ids of each phase, warm-up first. counts: how many of each phase's
    ids lie in each domain. decisions: what each decision file in the run's folder holds. hash: of the parameters.
    """

    losses: list[float]
    phases: list[list[int]]
    counts: list[list[int]]
    decisions: list[dict[str, Any]]
    hash: str


class Recorder(Hook):
    """Keeps the ids of every phase that starts."""

    def __init__(self) -> None:
        self.phases: list[list[int]] = []

    def on_phase_start(self, run: Any, phase: Any, plan: Any) -> None:
        self.phases.append(plan.sample_ids.tolist())


def _nothing(outcome: Outcome) -> None:
    return None


@dataclass(frozen=True)
class Case:
    """``kind`` and registered ``name``, the params it is built with, and what must hold of its outcome.

    variant: tells several rows of one component apart. model: a kind of `tests.tiny_engine.model`. prepare: makes what
    it needs in a folder, and returns further params. compared: the group of samples whose size must stay at a resume.
    """

    kind: str
    name: str
    params: dict[str, Any] = field(default_factory=dict)
    expect: Callable[[Outcome], None] = _nothing
    variant: str = ""
    model: str = "full"
    prepare: Callable[[Path], dict[str, Any]] = lambda folder: {}
    compared: str = ""

    @property
    def id(self) -> str:
        return "-".join(filter(None, (self.kind, self.name, self.variant)))

    @property
    def train_type(self) -> str:
        return {"selector": "dynamic_select", "mixer": "dynamic_mix", "weighter": "dynamic_weight"}[self.kind]


def picks_distinct_samples(outcome: Outcome) -> None:
    for picks in outcome.phases[1:]:
        assert len(picks) == len(set(picks)) == PICKED


def decides_anew(outcome: Outcome) -> None:
    picks_distinct_samples(outcome)
    assert set(outcome.phases[1]) != set(outcome.phases[2])


def picks_the_first_samples(outcome: Outcome) -> None:
    for picks in outcome.phases[1:]:
        assert sorted(picks) == list(range(PICKED))


def takes_best_scores(outcome: Outcome) -> None:
    picks_distinct_samples(outcome)
    for decision in outcome.decisions:
        scores = decision["metric"]["score"]
        assert scores == sorted(scores, reverse=True) and -1 <= scores[-1] < scores[0] <= 1


def serves_both_subtasks_alike(outcome: Outcome) -> None:
    picks_distinct_samples(outcome)
    for decision in outcome.decisions:
        assert {name: task["picks"] for name, task in decision["subtasks"].items()} == {"near": 6, "far": 6}
        assert abs(decision["overlap"]["random"] - PICKED / sum(SIZES.values())) < 1e-12
        serves = decision["metric"]["serves"]
        assert all({*serves[at : at + 2]} == {"near", "far"} for at in range(0, PICKED, 2))
    first, second = (set(decision["indices"]) for decision in outcome.decisions)
    again = len(first & second) / PICKED
    assert outcome.decisions[0]["overlap"]["last"] is None
    assert abs(outcome.decisions[1]["overlap"]["last"] - again) < 1e-12


def votes_fall(outcome: Outcome) -> None:
    picks_distinct_samples(outcome)
    for decision in outcome.decisions:
        votes = decision["metric"]["score"]
        assert votes == sorted(votes, reverse=True) and set(votes) <= set(range(7)) and votes[0] > 0


def takes_best_clusters(outcome: Outcome) -> None:
    picks_distinct_samples(outcome)
    for decision in outcome.decisions:
        scores, clusters = decision["metric"]["score"], decision["metric"]["cluster"]
        assert scores == sorted(scores, reverse=True)
        assert len(set(clusters)) == 1 + sum(a != b for a, b in itertools.pairwise(clusters))


def mixes(*shares: float) -> Callable[[Outcome], None]:
    def expect(outcome: Outcome) -> None:
        for counts in outcome.counts[1:]:
            assert np.abs(np.array(counts) - np.array(shares) * PICKED).max() < 1
        for decision in outcome.decisions:
            np.testing.assert_allclose(list(decision["proportions"].values()), shares)

    return expect


def mixes_anew(outcome: Outcome) -> None:
    first, second = (list(d["proportions"].values()) for d in outcome.decisions)
    assert first != second
    for counts, shares in zip(outcome.counts[1:], (first, second), strict=True):
        assert np.abs(np.array(counts) - np.array(shares) * PICKED).max() < 1


def with_reference(folder: Path) -> dict[str, Any]:
    """A reference model; a collective."""
    if dist.is_main():
        tiny_llama(initializer_range=0.02, seed=1).save_pretrained(folder / "reference")
    dist.barrier()
    return {"reference_model_path": str(folder / "reference")}


def takes_the_nearest(outcome: Outcome) -> None:
    picks_distinct_samples(outcome)
    for decision in outcome.decisions:
        assert all(-1 <= score <= 1.0001 for score in decision["metric"]["score"])


def draws_by_probability(outcome: Outcome) -> None:
    for picks, decision in zip(outcome.phases[1:], outcome.decisions, strict=True):
        assert len(picks) == PICKED and all(0 < p <= 1 for p in decision["metric"]["score"])


def with_embedder(folder: Path) -> dict[str, Any]:
    """A model of its own that embeds, of the run's vocabulary; a collective."""
    if dist.is_main():
        tiny_llama(initializer_range=0.02, seed=1).save_pretrained(folder / "embedder")
        byte_tokenizer().save_pretrained(folder / "embedder")
    dist.barrier()
    return {"embedding_model": str(folder / "embedder")}


_LESS = {"gradient_type": "adam", "adam_form": "official", "proj_dim": 64, "seed": 1}
_ALL = "global micro-batch"
_LESS_EXACT = {"scoring": "exact", "accumulate": True, "layers": ["layers"], "layer_weights": {"mlp": 2.0}}
_TWICE = {"aggregate": "doubly_greedy"}
_HEAD = {"sketch_dim": 64, "proj_dim": 256}
CASES = [
    Case("selector", "less", _LESS, takes_best_scores),
    Case("selector", "less", _LESS_EXACT | _TWICE, serves_both_subtasks_alike, "exact"),
    Case("selector", "less", {**_LESS, "aggregate": "round_robin"}, serves_both_subtasks_alike, "turns"),
    Case("selector", "less_head", _HEAD, takes_best_scores),
    Case("selector", "less_head", {**_HEAD, "aggregate": "vote", "per": "target"}, votes_fall, "vote"),
    Case("selector", "cluster_less", {**_LESS, "n_clusters": 6, "representatives": 2}, takes_best_clusters),
    Case("selector", "rds", {"layer": 1, "refresh": "once"}, takes_the_nearest),
    Case("selector", "near", {"pooling": "last", "max_neighbours": 20}, takes_the_nearest, prepare=with_embedder),
    Case("selector", "tsds", {"max_k": 6, "alpha": 0.1}, draws_by_probability),
    Case("selector", "loss", {"focus": "high", "focus_weight": 3.0, "temperature": 0.5}, decides_anew),
    Case("selector", "random", {"seed": 5}, decides_anew),
    Case("selector", "custom", {}, picks_the_first_samples),
    Case("mixer", "random", {"seed": 5}, mixes_anew),
    Case("mixer", "static", {"proportions": [3, 1]}, mixes(0.75, 0.25)),
    Case("mixer", "stratified", {}, mixes(24 / 64, 40 / 64)),
    Case("mixer", "temperature", {"tau": 0.0}, mixes(0.5, 0.5)),
    Case("mixer", "odm", {"alpha": 0.5}, mixes_anew),
    Case("mixer", "odm", {"alpha": 0.5, "variant": "official"}, mixes_anew, "official"),
    Case("mixer", "doremi", {"reweight_eta": 0.5}, mixes(0.5, 0.5), prepare=with_reference, compared=_ALL),
    Case(
        "mixer",
        "doremi",
        {"reweight_eta": 0.5, "variant": "official"},
        mixes(0.5, 0.5),
        "official",
        prepare=with_reference,
        compared=_ALL,
    ),
    Case("mixer", "dynamic_moe", {"eval_samples": 7}, mixes(0.5, 0.5), model="moe"),
    Case("mixer", "dynamic_moe", {"eval_samples": 7, "variant": "official"}, mixes(0.5, 0.5), "official", model="moe"),
    Case("weighter", "loss", {"strategy": "linupper", "r_start": 1.0, "r_end": 0.25}, compared=_ALL),
    Case("weighter", "adapt", {"refresh_step": 2}),
    Case(
        "weighter",
        "adapt",
        {"weight": "softmax", "num_anchors": 4, "refresh_step": 2, "similarity": "max", "temperature": 0.05},
        variant="softmax",
        compared=_ALL,
    ),
    Case("weighter", "dft"),
    Case("weighter", "eaft", {"alpha": 2.0, "top": 5}),
    Case("weighter", "rho", {"share": 0.25}, prepare=with_reference, compared=_ALL),
    Case("weighter", "custom", {"strategy": "uniform"}, compared="micro-batch"),
]
