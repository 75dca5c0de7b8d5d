"""Every param of every selector does what it says: scores by hand in float64, planted losses, frequencies."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.data.pool import Pool
from dataflex.ops.projection.project_kinds import PROJECTIONS
from dataflex.scoring.checks.head_check import known_head
from dataflex.scoring.decide.rules import RULES, decide
from dataflex.scoring.decide.table import ArrayTable
from dataflex.scoring.gradients.layers import LayerRule
from dataflex.scoring.passes.head_pass import HeadFeatures
from dataflex.scoring.scorer import Scorer
from dataflex.train.selector import cluster_less_selector, less_selector
from dataflex.train.selector.cluster_less_selector import ClusterLessSelector, Clusters
from dataflex.train.selector.less_head_selector import LessHeadSelector
from dataflex.train.selector.less_selector import LessSelector
from dataflex.train.selector.loss_selector import LossSelector
from dataflex.train.selector.random_selector import RandomSelector
from dataflex.utils.errors import UserError
from tests import families
from tests import tiny_engine as tiny
from tests.ops.by_hand import FORMULAS
from tests.scoring import test_coverage
from tests.train.options import OPTIONS, all_params, option

NET = tiny.model("full")
POOL = Pool.from_datasets({"a": tiny.samples(5, seed=1), "b": tiny.samples(4, seed=2)})
TASKS = "xyx"
TARGET = Pool.from_datasets(
    {
        name: [sample | {"task": task} for sample, task in zip(tiny.samples(3, seed), TASKS, strict=True)]
        for name, seed in (("near", 3), ("far", 4))
    }
)
NAMES = [name for name, _ in NET.named_parameters()]


# An eps that tells the forms of Adam's direction apart, and means that leave something of the gradient.
CONSTANTS = replace(test_coverage.CONSTANTS, eps=3e-3)
MOMENTS = {name: (0.1 * m, v) for name, (m, v) in test_coverage.random_moments(NET).items()}


def scorer() -> Scorer:
    made = test_coverage.scorer(NET)
    made._read_moments = lambda names: ({name: MOMENTS[name] for name in names}, CONSTANTS)
    return made


@cache
def gradients(of_target: bool, kind: str) -> list[dict[str, torch.Tensor]]:
    """{name: float64 matrix} of each sample: its gradient by autograd, transformed by the formula ``kind``."""
    exact, c = tiny.model("full").double().eval(), CONSTANTS
    rows = []
    for sample in TARGET if of_target else POOL:
        row = {}
        for name, grad in families.sample_gradient(exact, sample).items():
            m, v = (moment.double() for moment in MOMENTS[name])
            row[name] = FORMULAS[kind](grad.clone(), m, v, c.beta1, c.beta2, c.eps, c.step)
        rows.append(row)
    return rows


def unit(rows: Any) -> np.ndarray:
    return np.asarray(rows) / np.linalg.norm(rows, axis=1, keepdims=True)


def vectors(rows: list[dict[str, torch.Tensor]], factors: dict[str, float]) -> np.ndarray:
    return np.stack([torch.cat([f * row[n].flatten() for n, f in factors.items()]).numpy() for row in rows])


def table_by_hand(kind: str = "adam_less", factors: Any = None, subtasks: Sequence[Any] = "nnnfff") -> np.ndarray:
    """LESS's scores of the pool: a column for each subtask, the mean cosine with its targets."""
    factors = factors or dict.fromkeys(NAMES, 1.0)
    cosines = unit(vectors(gradients(False, kind), factors)) @ unit(vectors(gradients(True, "sgd"), factors)).T
    kinds = list(dict.fromkeys(subtasks))
    return np.stack([cosines[:, np.array(list(subtasks)) == k].mean(1) for k in kinds], axis=1)


def by_hand(*how: Any, **more: Any) -> np.ndarray:
    """The largest over subtasks, as the paper has it."""
    best: np.ndarray = table_by_hand(*how, **more).max(axis=1)
    return best


def less(**params: Any) -> LessSelector:
    given = {"scoring": "exact", "self_check": False} | params
    return LessSelector(POOL, None, None, "", scorer(), TARGET, **given)


def scores(selector: Any) -> np.ndarray:
    """The largest of each sample's scores."""
    best: np.ndarray = selector.each().max(axis=1)
    return best


def close(found: Any, want: np.ndarray, others: Sequence[np.ndarray] = ()) -> None:
    """The scores are those by hand; ``others`` lie apart from them, so that the test tells them from each other."""
    np.testing.assert_allclose(found, want, atol=1e-6)
    assert all(np.abs(other - want).max() > 1e-4 for other in others)


@option("selector", "less", "gradient_type", "adam_form", "scoring")
def test_the_form_of_the_gradient() -> None:
    forms = {kind: by_hand(kind) for kind in ("adam_less", "adam", "sgd")}
    for params, kind in (({}, "adam_less"), ({"adam_form": "optimizer"}, "adam"), ({"gradient_type": "sgd"}, "sgd")):
        close(scores(less(**params)), forms[kind], [right for other, right in forms.items() if other != kind])


@option("selector", "less", "projection", "proj_dim")
def test_projections_come_near_the_exact_scores_with_more_numbers() -> None:
    """Of one matrix, since some projections make every sign for each of its elements."""
    layer = "model.layers.1.self_attn.k_proj.weight"
    exact, seen = by_hand("sgd", {layer: 1.0}), []
    for projection in PROJECTIONS:
        errors = []
        for proj_dim in (16, 1024):
            params = {"projection": projection, "proj_dim": proj_dim, "gradient_type": "sgd", "layers": [layer]}
            runs = [scores(less(scoring="projected", seed=seed, **params)) for seed in (1, 2)]
            errors.append(float(np.sqrt(np.mean((np.array(runs) - exact) ** 2))))
        seen.append(runs[0])
        assert errors[1] < errors[0] / 2 and errors[1] < 0.06, (projection, errors)
    assert len({found.tobytes() for found in seen}) == len(PROJECTIONS)


@option("selector", "less", "seed")
def test_the_seed_is_of_the_projection() -> None:
    first, again, other = (scores(less(scoring="projected", proj_dim=256, seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.array_equal(scores(less(seed=1)), scores(less(seed=2)))


@option("selector", "less", "layers", "layer_weights")
def test_layers_and_their_weights() -> None:
    mlp = {name: 1.0 for name in NAMES if ".mlp." in name}
    last = {name: 1.0 for name in NAMES if ".layers.1." in name}
    weighted = {name: 3.0 if ".mlp." in name else 0.5 if "lm_head" in name else 1.0 for name in NAMES}
    found = {"mlp": by_hand(factors=mlp), "last": by_hand(factors=last), "weighted": by_hand(factors=weighted)}
    found["all"] = by_hand()
    rows = {"mlp": {"layers": ["mlp"]}, "last": {"layers": ["last:1"]}, "all": {}}
    rows["weighted"] = {"layer_weights": {"mlp": 3.0, "lm_head": 0.5}}
    for name, params in rows.items():
        close(scores(less(**params)), found[name], [right for other, right in found.items() if other != name])
    assert LayerRule.of(["!mlp"], None).factors(NAMES).keys() == set(NAMES) - set(mlp)


@option("selector", "less", "subtask_column")
def test_subtasks_by_a_column() -> None:
    close(scores(less()), by_hand(), [by_hand(subtasks="xyxxyx"), by_hand(subtasks="000000")])
    close(scores(less(subtask_column="task")), by_hand(subtasks="xyxxyx"), [by_hand()])


@option("selector", "less", "aggregate", "per", "vote_share")
def test_rules_take_from_a_column_for_each_subtask_or_each_sample() -> None:
    tables = {"subtask": table_by_hand(), "target": table_by_hand(subtasks=range(6))}
    for per, right in tables.items():
        found = less(per=per).table()
        assert found is not None
        np.testing.assert_allclose(found.rows(np.arange(9)), right, atol=1e-6)
    for rule in RULES:
        for per, right in tables.items():
            for share in (None, 0.3) if rule == "vote" else (None,):
                # The targets of "near" and "far" in turn: 0 and 3, 1 and 4, 2 and 5.
                order = np.array([0, 3, 1, 4, 2, 5]) if per == "target" else None
                want = decide(ArrayTable(right.astype(np.float32)), 5, rule, vote_share=share, order=order)
                selector = less(aggregate=rule, per=per, vote_share=share)
                assert selector.select(None, 0, 5) == want.picks.tolist(), (rule, per)
                serves = [["near", "far"][j if per == "subtask" else j // 3] for j in want.column]
                assert selector.metric["serves"] == serves
    picks = [less(aggregate="vote", vote_share=share).select(None, 0, 4) for share in (0.15, 0.7)]
    assert picks[0] != picks[1]


@option("selector", "less", "accumulate")
def test_scores_are_added_up_by_learning_rate() -> None:
    answers = np.float32([[0.9, 0.1, 0.5], [0.2, 0.6, 0.5]])
    for accumulate, rates, want in ((False, [1, 1], [0.2, 0.6, 0.5]), (True, [0.5, 0.1], [0.47, 0.11, 0.3])):
        selector = less(accumulate=accumulate)
        selector.dataset = range(3)
        for step, (scores, rate) in enumerate(zip(answers, rates, strict=True)):
            selector.scorer = SimpleNamespace(engine=SimpleNamespace(get_lr=lambda rate=rate: [rate]))
            selector.table = lambda scores=scores: ArrayTable(scores[:, None])  # type: ignore[method-assign,misc]
            for _ in range(2):  # asked again at the same step, nothing is added
                picks = selector.select(None, step, 3)
        np.testing.assert_allclose(selector.scored["score"], want, rtol=1e-6)
        assert picks == np.argsort(-np.array(want)).tolist()


def test_one_score_of_a_sum_over_decisions_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^less: accumulate: sums over the decisions of a run, .*; set it false, score"
    ):
        less(accumulate=True).each()


@option("selector", "less", "self_check")
def test_the_self_check_runs_once_or_not_at_all() -> None:
    for self_check, times in ((True, 1), (False, 0)):
        calls: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(less_selector, "check_one_sample", lambda *_, calls=calls: calls.append(1))
            selector = less(self_check=self_check)
            selector.table = lambda: ArrayTable(np.zeros((9, 2), dtype=np.float32))  # type: ignore[method-assign]
            for step in range(2):
                selector.select(None, step, 2)
        assert len(calls) == times


@option("selector", "less_head", "sketch_dim", "proj_dim", "seed", "subtask_column", "aggregate", "per", "vote_share")
def test_features_of_the_output_layer_are_as_asked() -> None:
    """The features themselves: tests/scoring/test_head_pass.py."""
    _, batch = next(iter(scorer().batches(POOL, np.arange(1), "one sample")))
    head = known_head(NET, batch, device=torch.device("cpu"))
    usual: dict[str, Any] = {"sketch_dim": 2048, "proj_dim": 8192, "seed": 42, "subtask_column": None}
    found, want = [], []
    for params in ({}, {"sketch_dim": 16}, {"proj_dim": 256}, {"seed": 1}, {"subtask_column": "task"}):
        sketch, proj, seed, column = (usual | params).values()
        made = HeadFeatures(head, sketch, proj, seed)
        cosines = unit(made.of_samples(scorer(), POOL)) @ unit(made.of_samples(scorer(), TARGET)).T
        tasks = np.array(list("xyxxyx" if column else "nnnfff"))
        want.append(np.max([cosines[:, tasks == task].mean(1) for task in sorted(set(tasks))], axis=0))
        found.append(scores(LessHeadSelector(POOL, None, None, None, scorer(), TARGET, lambda: head, **params)))
    for at, made_ones in enumerate(found):
        close(made_ones, want[at], want[:at] + want[at + 1 :])
    made = HeadFeatures(head, 2048, 8192, 42)
    right = (unit(made.of_samples(scorer(), POOL)) @ unit(made.of_samples(scorer(), TARGET)).T).astype(np.float32)
    for params in ({"aggregate": "round_robin"}, {"aggregate": "vote", "vote_share": 0.4}):
        selector = LessHeadSelector(POOL, None, None, None, scorer(), TARGET, lambda: head, per="target", **params)
        order, share = np.array([0, 3, 1, 4, 2, 5]), params.get("vote_share")
        want_picks = decide(ArrayTable(right), 5, params["aggregate"], vote_share=share, order=order).picks
        assert selector.select(None, 0, 5) == want_picks.tolist()


def test_a_decision_of_less_head_scores_once_however_often_it_is_asked() -> None:
    """Where samples are packed a selector is asked for several numbers at a step."""
    selector, calls = less_head_with(np.float32([0.1, 0.9, 0.5]))
    assert [selector.select(None, 4, count) for count in (1, 3, 2)] == [[1], [1, 2, 0], [1, 2]] and len(calls) == 1
    selector.forget()
    assert selector.select(None, 4, 1) == [1] and len(calls) == 2
    selector, _ = less_head_with(np.float32([0.1, np.nan, 0.5]))
    with pytest.raises(UserError, match=r"^less_head at step 4: scores of sample ids \[1\] are not finite$"):
        selector.select(None, 4, 1)


def less_head_with(scores: np.ndarray) -> tuple[LessHeadSelector, list[int]]:
    """A selector with these scores, and what is added to whenever they are made."""
    calls: list[int] = []
    made = LessHeadSelector(range(len(scores)), None, None, None, scorer(), TARGET, lambda: None)  # type: ignore[arg-type,return-value]
    made.table = lambda: (calls.append(1), ArrayTable(scores[:, None]))[1]  # type: ignore[method-assign,func-returns-value]
    return made, calls


CLUSTERS = Clusters(np.array([0, 1, 0, 1, 0, 2, 1, 0, 2]), np.float32([0.3, 0.1, 0.2, 0.4, 0.1, 0.0, 0.2, 0.4, 0.5]))
NEAREST = {0: [4, 2, 0, 7], 1: [1, 6, 3], 2: [5, 8]}


FEATURES = np.random.default_rng(3).standard_normal((9, 4)).astype(np.float32)
GOALS = np.random.default_rng(4).standard_normal((6, 4)).astype(np.float32)


def cluster_less(**params: Any) -> tuple[np.ndarray, list[Any]]:
    """Scores of the pool in planted clusters with planted features, and what was asked of the others."""
    asked: list[Any] = []

    def clusters(vectors: Any, count: int, seed: int) -> Clusters:
        asked.append((count, seed))
        return CLUSTERS

    def embeddings(scorer: Any, dataset: Any, *, pooling: str) -> np.ndarray:
        asked.append(pooling)
        return np.ones((len(dataset), 2), dtype=np.float32)

    def features(dataset: Any, ids: Any = None, **how: Any) -> np.ndarray:
        asked.append({key: how[key] for key in ("adam", "proj_dim", "seed")})
        return GOALS if dataset is TARGET else FEATURES[ids]

    stand_in: Any = SimpleNamespace(gradient_features=features, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_less_selector, "k_means", clusters)
        patch.setattr(cluster_less_selector, "embeddings", embeddings)
        selector = ClusterLessSelector(POOL, None, None, "", stand_in, TARGET, **{"n_clusters": 3} | params)
        return scores(selector), asked


@option("selector", "cluster_less", "representatives")
def test_the_mean_of_the_representatives_stands_for_its_cluster() -> None:
    for count in (1, 2, 3, 9):
        means = np.stack([FEATURES[ids[:count]].mean(0) for ids in NEAREST.values()])
        cosines = unit(means) @ unit(GOALS).T
        want = np.maximum(cosines[:, :3].mean(1), cosines[:, 3:].mean(1))[CLUSTERS.of]
        np.testing.assert_allclose(cluster_less(representatives=count)[0], want, rtol=1e-5)


@option("selector", "cluster_less", "subtask_column")
def test_clusters_are_scored_for_the_subtasks_of_a_column() -> None:
    means = np.stack([FEATURES[ids[:4]].mean(0) for ids in NEAREST.values()])
    cosines = unit(means) @ unit(GOALS).T
    tasks = np.array(list("xyxxyx"))
    want = np.maximum(cosines[:, tasks == "x"].mean(1), cosines[:, tasks == "y"].mean(1))[CLUSTERS.of]
    np.testing.assert_allclose(cluster_less(subtask_column="task")[0], want, rtol=1e-5)
    assert np.abs(cluster_less()[0] - want).max() > 1e-3


@option("selector", "cluster_less", "gradient_type", "adam_form", "proj_dim")
def test_the_features_of_the_representatives() -> None:
    for params, adam in (({}, "adam_less"), ({"adam_form": "optimizer"}, "adam"), ({"gradient_type": "sgd"}, None)):
        how = {"proj_dim": 256, "seed": 6}
        *_, of_target, of_pool = cluster_less(**params, **how)[1]
        assert (of_target, of_pool) == ({"adam": None, **how}, {"adam": adam, **how})


@option("selector", "cluster_less", "n_clusters", "pooling", "seed")
def test_the_clustering_gets_its_params() -> None:
    for n_clusters, pooling, seed in ((3, "mean", 42), (5, "last", 7)):
        asked = cluster_less(n_clusters=n_clusters, pooling=pooling, seed=seed)[1]
        assert asked[:2] == [pooling, (n_clusters, seed)]


LOSSES = np.float32([5, 1, 3, 9, 7, 2, 8, 4, 6, 0])


def loss(count: int = 4, step: int = 0, losses: np.ndarray = LOSSES, **params: Any) -> list[int]:
    stand_in: Any = SimpleNamespace(losses=lambda dataset: (losses, losses))
    pool: Any = SimpleNamespace(domain_ids=np.arange(len(losses)) % 2, __len__=None)
    counts = params.pop("domain_counts", None)
    selector = LossSelector(range(len(losses)), None, None, "", stand_in, **params)
    if counts is not None:
        selector.dataset = pool
    return selector.select(None, step, count, domain_counts=counts)


@option("selector", "loss", "focus", "quantiles")
def test_the_bucket_in_focus_comes_first() -> None:
    sharp = {"focus_weight": 1e9}
    for focus, want in (("low", {0, 1, 2}), ("medium", {3, 4, 5}), ("high", {6, 7, 8, 9})):
        assert {LOSSES[i] for i in loss(len(want), focus=focus, quantiles=(0.25, 0.6), **sharp)} == want
    assert {LOSSES[i] for i in loss(1, focus="high", quantiles=(0.3, 0.9), **sharp)} == {9}


@option("selector", "loss", "focus_weight", "temperature", "replacement")
def test_the_focus_is_as_much_likelier_as_its_weight_says() -> None:
    losses = np.tile(LOSSES, 5)
    for weight, temperature, odds in ((4.0, 1.0, 4.0), (9.0, 1.0, 9.0), (9.0, 2.0, 3.0), (4.0, 0.5, 16.0)):
        params = {"focus_weight": weight, "temperature": temperature, "quantiles": (0.33, 0.79), "replacement": True}
        share = np.mean(losses[loss(6000, losses=losses, focus="high", **params)] >= 8)
        assert share == pytest.approx(2 * odds / (2 * odds + 8), abs=0.02)
    assert len(set(loss(10, replacement=False))) == 10 > len(set(loss(10, replacement=True)))


@option("selector", "loss", "seed")
def test_each_step_and_each_seed_draws_anew() -> None:
    losses = np.tile(LOSSES, 5)
    draws = [tuple(loss(20, step, losses, seed=seed)) for step in range(3) for seed in range(3)]
    assert len(set(draws)) == 9 and tuple(loss(20, 2, losses, seed=2)) == draws[-1]
    by_domain = [loss(6, step, losses, domain_counts=np.array([4, 2])) for step in range(2)]
    assert by_domain[0] != by_domain[1]
    for picks in by_domain:
        assert [i % 2 for i in picks] == [0, 0, 0, 0, 1, 1]


@option("selector", "random", "seed", "replacement")
def test_random_draws() -> None:
    def picks(step: int, **params: Any) -> tuple[int, ...]:
        return tuple(RandomSelector(range(30), None, None, "", **params).select(None, step, 30))

    draws = [picks(step, seed=seed) for step in range(3) for seed in range(3)]
    assert len(set(draws)) == 9 and all(sorted(draw) == list(range(30)) for draw in draws)
    assert len(set(picks(0, replacement=True))) < 30 and picks(0, seed=3) == picks(0, seed=3)


def test_every_param_of_every_selector_has_a_row() -> None:
    importlib.import_module("tests.train.test_embedding_selectors")  # has rows of its own
    assert {row for row in OPTIONS if row[0] == "selector"} == all_params("selector"), "write a test with @option"
