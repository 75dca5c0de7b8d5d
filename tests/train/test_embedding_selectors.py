"""`rds`, `near` and `tsds`: what they pick of planted vectors, against plain float64 loops; every param of theirs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.core.plan import generator
from dataflex.core.sampling import weighted_draw
from dataflex.data.pool import Pool
from dataflex.scoring.kept.probe import Probe
from dataflex.scoring.kept.sharded import ScoringPasses
from dataflex.train.selector import embeddings as module
from dataflex.train.selector.rds_selector import NearSelector, RdsSelector
from dataflex.train.selector.target_selector import in_turns
from dataflex.train.selector.tsds_selector import TsdsSelector
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.scoring.test_coverage import scorer
from tests.scoring.test_neighbours import in_float64, planted, unit
from tests.scoring.test_tsds import clusters, densities, plainly
from tests.train.options import option

NET = tiny.model("full")
SIZES, GOALS = {"one": 180, "two": 120}, {"near": 12, "far": 8}
POOL = Pool.from_datasets({name: tiny.samples(n, seed=n, longest=8) for name, n in SIZES.items()})
TARGET = Pool.from_datasets(
    {
        name: [{**sample, "task": "abc"[i % 3]} for i, sample in enumerate(tiny.samples(n, seed=n))]
        for name, n in GOALS.items()
    }
)
Picks = list[int]


class Planted:
    """Stands in for the pass: the planted vectors, and what was asked."""

    def __init__(self) -> None:
        self.rows = dict(zip(("pool", "target"), planted(), strict=True))
        self.asked: list[Any] = []

    def __call__(self, _scorer: Any, dataset: Any, ids: Any, **how: Any) -> np.ndarray:
        self.asked.append((dataset is TARGET, len(ids), how))
        return self.rows["target" if dataset is TARGET else "pool"][ids]


@pytest.fixture(autouse=True)
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Planted]:
    stand_in = Planted()
    monkeypatch.setattr(module, "embeddings", stand_in)
    yield stand_in


def make(cls: Any, **params: Any) -> Any:
    return cls(POOL, None, None, "", scorer(NET), TARGET, **params)


def dealt(cosines: np.ndarray, order: list[int], count: int, among: Any = None, turn: int = 0) -> Picks:
    """Each column of ``order`` in turn takes its best sample that is not taken."""
    free = set(range(len(cosines)) if among is None else among)
    picks: Picks = []
    for at in range(turn, turn + count):
        best = max(free, key=lambda i: (cosines[i, order[at % len(order)]], -i))
        picks.append(best)
        free.remove(best)
    return picks


def cosines() -> np.ndarray:
    vectors, targets = planted()
    return vectors.astype(np.float64) @ targets.astype(np.float64).T


# Three subtasks of the column: "a" has 7 of the targets, "b" 7, "c" 6.
TASKS = np.array([*("abc" * 4), *"abcabcab"])


@option("selector", "rds", "aggregate", "per", "subtask_column", "vote_share")
def test_rds_deals_to_the_subtasks_and_in_them_to_their_samples_in_turn() -> None:
    near, far = list(range(12)), [12 + i % 8 for i in range(12)]
    order = [j for pair in zip(near, far, strict=True) for j in pair]
    assert in_turns(TARGET.domain_ids).tolist() == order
    assert make(RdsSelector).select(None, 3, 60) == dealt(cosines(), order, 60)
    members = [np.flatnonzero(task == TASKS) for task in "abc"]
    order = [int(np.resize(places, 7)[r]) for r in range(7) for places in members]
    assert make(RdsSelector, subtask_column="task").select(None, 3, 60) == dealt(cosines(), order, 60)
    means = np.stack([cosines()[:, places].mean(1) for places in members], axis=1)
    found = make(RdsSelector, subtask_column="task", per="subtask")
    assert found.select(None, 3, 60) == dealt(means, [0, 1, 2], 60)
    found = make(RdsSelector, per="target", aggregate="max")
    assert found.select(None, 3, 60) == np.argsort(-cosines().max(1), kind="stable")[:60].tolist()
    np.testing.assert_allclose(found.scored["score"], cosines().max(1), atol=1e-6)
    found = make(RdsSelector, subtask_column="task", per="subtask", aggregate="mean")
    assert found.select(None, 3, 60) == np.argsort(-means.mean(1), kind="stable")[:60].tolist()
    few, many = (make(RdsSelector, aggregate="vote", vote_share=share).select(None, 3, 9) for share in (0.02, 0.6))
    assert few != many


@option("selector", "near", "aggregate", "per", "subtask_column", "vote_share")
def test_near_decides_as_rds_does() -> None:
    for params in ({"aggregate": "max"}, {"per": "subtask"}, {"subtask_column": "task"}, {"aggregate": "vote"}):
        share = {"vote_share": 0.1} if params.get("aggregate") == "vote" else {}
        one, other = (make(cls, **params, **share) for cls in (NearSelector, RdsSelector))
        assert one.select(None, 3, 60) == other.select(None, 3, 60)
    assert make(NearSelector).select(None, 3, 60) != make(NearSelector, aggregate="max").select(None, 3, 60)


@pytest.mark.parametrize("cls", [RdsSelector, NearSelector])
def test_a_mixers_counts_are_kept_and_turns_go_on(cls: Any) -> None:
    found = make(cls).select(None, 3, 50, domain_counts=np.array([13, 37]))
    order = in_turns(TARGET.domain_ids).tolist()
    want = dealt(cosines(), order, 13, range(180)) + dealt(cosines(), order, 37, range(180, 300), turn=13)
    assert found == want


def test_copies_of_the_targets_are_found_first(plant: Planted) -> None:
    """In 20 turns eight of the second subtask's samples and ten of the first one's had their first."""
    draw = np.random.default_rng(5)
    plant.rows["pool"], places = unit(draw.normal(size=(300, 24))), draw.permutation(300)[:20]
    plant.rows["pool"][places] = plant.rows["target"]
    picks = make(NearSelector).select(None, 3, 20)
    turns = in_turns(TARGET.domain_ids)[:20]
    first = [at for at, j in enumerate(turns) if j not in turns[:at]]
    assert len(first) == 18 and [picks[at] for at in first] == places[turns[first]].tolist()


@option("selector", "near", "max_neighbours")
def test_only_the_nearest_of_some_target_are_taken() -> None:
    ids, _ = in_float64(*planted())
    allowed = set(ids[:, :4].ravel().tolist())
    found = make(NearSelector, max_neighbours=4)
    assert found.most_picks == 4 * len(found.target)
    assert set(found.select(None, 3, 40)) <= allowed
    assert not set(make(NearSelector).select(None, 3, len(allowed))) <= allowed
    with pytest.raises(UserError, match=rf"near at step 3: max_neighbours: {len(allowed)} .* {len(allowed) + 1} are"):
        found.select(None, 3, len(allowed) + 1)


@pytest.mark.parametrize("cls", [RdsSelector, NearSelector, TsdsSelector])
def test_small_pools_many_targets_and_vectors_of_zeros(cls: Any, plant: Planted) -> None:
    plant.rows = {"pool": unit(np.random.default_rng(0).normal(size=(3, 4))), "target": np.zeros((20, 4), np.float32)}
    plant.rows["target"][:19] = unit(np.random.default_rng(1).normal(size=(19, 4)))
    plant.rows["pool"][1] = 0
    for size in (3, 1):
        pool = Pool.from_datasets(tiny.samples(size, seed=1))
        selector = cls(pool, None, None, "", scorer(NET), TARGET)
        picks = selector.select(None, 3, size)
        assert len(picks) == size and set(picks) <= set(range(size))
        assert cls is TsdsSelector or sorted(picks) == list(range(size))


HOW = ("pooling", "layer", "embedding_model", "refresh")


@option("selector", "rds", *HOW)
@option("selector", "near", *HOW)
@option("selector", "tsds", *HOW)
def test_embeddings_are_made_as_asked_and_as_often() -> None:
    for cls, pooling in ((RdsSelector, "weighted"), (NearSelector, "mean"), (TsdsSelector, "mean")):
        for params, how in (
            ({}, {"pooling": pooling, "layer": -1}),
            ({"pooling": "last", "layer": 1}, {"pooling": "last", "layer": 1}),
        ):
            plant = Planted()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "embeddings", plant)
                selector = make(cls, **params)
                for step in (3, 3, 5):
                    selector.select(None, step, 7)
                assert plant.asked == [(False, 300, {"unit": True, **how}), (True, 20, {"unit": True, **how})] * 2
                selector = make(cls, refresh="once")
                picks = [selector.select(None, step, 7) for step in (3, 5)]
                assert len(plant.asked) == 6
                saved = selector.state_dict()
                plant.rows["pool"] = plant.rows["pool"][::-1]
                again = make(cls, refresh="once")
                again.load_state_dict(saved)
                assert again.select(None, 5, 7) == picks[1] and len(plant.asked) == 6
                assert make(cls).state_dict() == {} == make(cls, refresh="once").state_dict()
        check_another_model(cls)


def check_another_model(cls: Any) -> None:
    """Its embeddings are made once, and nothing of them goes into a checkpoint."""
    plant, names, checked = Planted(), list[Any](), list[Any]()

    def open_embedder(name: str) -> Any:
        names.append(name)
        return SimpleNamespace(
            width=24,
            identity=lambda: {"embedding_model": "x"},
            check=lambda *how: checked.append(how),
            embeddings=lambda dataset, ids, **how: plant(None, dataset, ids, **how),
            close=lambda: names.append("closed"),
        )

    selector = make(cls, embedding_model="some/model", open_embedder=open_embedder, pooling="last", layer=9)
    for step in (3, 5):
        selector.select(None, step, 7)
    assert names == ["some/model", "closed"] and checked == [("last", 9, selector.embeddings.name)]
    assert [asked[:2] for asked in plant.asked] == [(False, 300), (True, 20)] and selector.state_dict() == {}


def shares(**how: Any) -> np.ndarray:
    """TSDS's probabilities of the planted clusters by the plain loop."""
    usual = {"max_k": 30, "kde_k": 30, "sigma": 0.75, "alpha": 0.6, "c": 5.0} | how
    vectors, targets = clusters(300, 20)
    ids, distances = (found[:, : usual["max_k"]] for found in in_float64(vectors, targets))
    union = np.unique(ids)
    dense = densities(vectors, union, usual["kde_k"], usual["sigma"]) if usual["sigma"] else np.ones(len(union))
    return plainly(ids, distances, dense[np.searchsorted(union, ids)], 300, usual["alpha"], usual["c"])


@option("selector", "tsds", "max_k", "kde_k", "sigma", "alpha", "c")
def test_tsds_probabilities_are_the_papers(plant: Planted) -> None:
    plant.rows = dict(zip(("pool", "target"), clusters(300, 20), strict=True))
    seen = []
    for params in ({}, {"max_k": 9}, {"kde_k": 4}, {"sigma": 0.3}, {"sigma": 0.0}, {"alpha": 0.999}, {"c": 0.05}):
        selector = make(TsdsSelector, **params)
        picks = selector.select(None, 3, 50)
        found = selector.scored["score"]
        np.testing.assert_allclose(found, shares(**params), atol=1e-6)
        assert found.dtype == np.float64 and abs(found.sum() - 1) < 1e-12
        assert selector.metric["score"] == found[picks].tolist()
        np.testing.assert_allclose(selector.scores(), found, rtol=1e-6)
        seen.append(found)
    for at, found in enumerate(seen):
        assert not any(np.allclose(found, other, atol=1e-6) for other in seen[at + 1 :])


def test_tsds_says_where_the_pool_has_too_few_neighbours(plant: Planted, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dataflex"):
        selector = make(TsdsSelector, max_k=5000, kde_k=30)
    assert caplog.messages == [
        "tsds: max_k 30 and kde_k 30, not 5,000 and 30: a tenth of the pool's 300 samples at most (2 at least)"
    ]
    assert selector.limit_advice == "a tenth of the pool is the most: set replacement: true, or lower update_step"
    assert make(TsdsSelector, max_k=30).limit_advice == "raise it or lower update_step"


@option("selector", "tsds", "replacement", "seed")
def test_tsds_draws_by_its_probabilities(plant: Planted) -> None:
    plant.rows = dict(zip(("pool", "target"), clusters(300, 20), strict=True))
    selector = make(TsdsSelector)
    many = selector.select(None, 3, 20000)
    p = selector.scored["score"]
    counts = np.bincount(many, minlength=300)
    assert (counts[p == 0] == 0).all() and (np.abs(counts - 20000 * p) < 5 * np.sqrt(20000 * p) + 1).all()
    want = weighted_draw(p, 40, replacement=True, draw=generator(42, "tsds", 3))
    assert selector.select(None, 3, 40) == want.tolist() and selector.replacement
    draws = [make(TsdsSelector, seed=seed).select(None, step, 40) for seed in (1, 2) for step in (3, 4)]
    assert len({tuple(draw) for draw in draws}) == 4
    once = make(TsdsSelector, replacement=False)
    assert len(set(once.select(None, 3, 40))) == 40 and not once.replacement
    with pytest.raises(UserError, match=r"asked for 300 samples, but only \d+ can be drawn; set replacement: true"):
        once.select(None, 3, 300)


@pytest.mark.parametrize(
    ("cls", "params", "words"),
    [
        (
            RdsSelector,
            {"pooling": "wighted"},
            r"rds: pooling: 'wighted' \(did you mean 'weighted'\?\); valid: mean, last",
        ),
        (NearSelector, {"refresh": "never"}, "near: refresh: 'never'; valid: every_update, once"),
        (TsdsSelector, {"layer": 7}, "tsds: layer: 7; valid: a layer's number from 1 to 2"),
        (NearSelector, {"max_neighbours": 0}, "near: max_neighbours: expected a whole number >= 1, or null, got 0"),
        (TsdsSelector, {"max_k": 1}, "tsds: max_k: expected a whole number >= 2, got 1"),
        (TsdsSelector, {"kde_k": 2.5}, "tsds: kde_k: expected a whole number >= 1, got 2.5"),
        (TsdsSelector, {"alpha": 1.5}, "tsds: expected alpha from 0 to 1, sigma >= 0 and c > 0, got alpha 1.5"),
        (RdsSelector, {"aggregate": "robin"}, "rds: aggregate: 'robin'"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(cls: Any, params: Any, words: str) -> None:
    with pytest.raises(UserError, match=f"^{words}") as caught:
        make(cls, **params)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cls", [RdsSelector, NearSelector, TsdsSelector])
def test_an_empty_target_and_vectors_that_are_not_finite_are_refused(cls: Any, plant: Planted) -> None:
    with pytest.raises(UserError, match=r"^(rds|near|tsds): eval_dataset: the target is empty"):
        cls(POOL, None, None, "", scorer(NET), None)
    plant.rows["pool"][5] = np.nan
    with pytest.raises(UserError, match=r"^\w+: embeddings of sample ids \[5\] of the pool are not finite$"):
        make(cls).select(None, 3, 4)
    with pytest.raises(UserError, match="keep_features: embeddings are kept in any case"):
        make(cls, passes=SimpleNamespace(keep_features=True))


@pytest.mark.parametrize("cls", [RdsSelector, NearSelector, TsdsSelector])
def test_a_dry_run_times_the_pass_and_knows_how_many_there_are(cls: Any, plant: Planted) -> None:
    for params, once in (({}, False), ({"refresh": "once"}, True)):
        passes = ScoringPasses(probe=Probe())
        selector = make(cls, passes=passes, **params)
        tried = selector.scores() if cls is TsdsSelector else selector.each()
        assert tried is None or tried.tolist() == [0.0] * 300
        assert (tried is None) == (cls is not TsdsSelector) and selector.scores_once is once
        assert passes.probe is not None and passes.probe.row_bytes == 4 * NET.config.hidden_size
        assert passes.probe.kept == "embeddings (fp32)" and passes.probe.samples == plant.asked[-1][1] < 300
        assert selector.state_dict() == {}, "what was tried is not kept"
