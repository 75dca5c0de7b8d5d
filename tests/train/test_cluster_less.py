"""`cluster_less`: embeddings against transformers' own in float64, the clustering, and what it picks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import dataflex
from dataflex.data.encoding.collate import Collator
from dataflex.data.pool import Pool
from dataflex.scoring.passes.embed_pass import embeddings, pooled
from dataflex.train.selector import cluster_less_selector
from dataflex.train.selector.cluster_less_selector import (
    ClusterLessSelector,
    Clusters,
    best_clusters_first,
    k_means,
    representatives,
)
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.distributed import run_ranks
from tests.train.test_planted import initialize, language

PICKS, TOPICS = 16, 4
MODELS = [("full", 0, False), ("full", 3, True), ("lora", 3, False)]


def target() -> Pool:
    return Pool.from_datasets(tiny.samples(2, seed=1))


def by_transformers(net: Any, pool: list[Any], pooling: str) -> np.ndarray:
    """Embeddings in float64 from the model's own hidden states, one sample at a time."""
    net = net.double().eval()
    found = []
    for sample in pool:
        with torch.no_grad():
            states = net(input_ids=torch.tensor([sample["input_ids"]]), output_hidden_states=True).hidden_states[-1][0]
        found.append(states.mean(0) if pooling == "mean" else states[-1])
    return torch.stack(found).numpy()


def embedding_error(kind: str, stage: int, packing: bool) -> float:
    """Largest error of both poolings relative to the largest value."""
    world = torch.distributed.get_world_size()
    engine = dataflex.initialize(
        model=tiny.model(kind, use_cache=False),
        config=tiny.ds_config(stage, micro_batch=4 // world),
        dataflex={"train_step": 1, "scoring_batch_tokens": 70},
        train_dataset=tiny.samples(8, seed=3),
        data_collator=Collator(0, packing=packing, cutoff_len=50),
    )
    pool = tiny.samples(13, seed=5)
    worst = 0.0
    for pooling in ("mean", "last"):
        want = by_transformers(tiny.model(kind), pool, pooling)
        worst = max(worst, float(np.abs(embeddings(engine.scorer, pool, pooling=pooling) - want).max() / want.max()))
    return worst


def topic(count: int, seed: int, number: int) -> list[dict[str, list[int]]]:
    """Sentences of a topic, which has ten words of its own."""
    made = language(count, seed, grammar=number)
    return [{key: [3 + 10 * number + i % 10 for i in ids] for key, ids in sample.items()} for sample in made]


def share_of_own() -> float:
    """Share of the target's topic among the picks after a warm-up on the whole pool."""
    pool = {str(number): topic(PICKS, 1 + number, number) for number in range(TOPICS)}
    engine = initialize(pool, train_step=20, target=topic(6, 9, 2))
    for batch in engine.batches():
        engine.training_step(batch)
    selector = ClusterLessSelector(
        engine.run.pool,
        None,
        None,
        "",
        engine.scorer,
        engine.eval_pool,
        n_clusters=2 * TOPICS,
        representatives=3,
        proj_dim=256,
    )
    picks = selector.select(engine.module, engine.run.step, PICKS)
    assert selector.metric["score"] == selector.each().max(axis=1)[picks].tolist()
    return float(np.mean(engine.run.pool.domain_ids[picks] == 2))


def everything() -> dict[str, Any]:
    return {"errors": [embedding_error(*model) for model in MODELS], "share": share_of_own()}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return [rank for world in (1, 2) for rank in run_ranks("tests.train.test_cluster_less:everything", world)]


def test_embeddings_are_the_last_hidden_states(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert max(rank["errors"]) < 1e-5


def test_it_prefers_the_targets_topic(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert rank["share"] >= 3 / TOPICS


def test_pooling_leaves_padding_out_and_takes_empty_samples() -> None:
    hidden = torch.tensor([[1.0], [3.0], [9.0], [9.0], [5.0]], dtype=torch.bfloat16)
    real = torch.tensor([True, True, False, False, True])
    cu_seqlens = torch.tensor([0, 3, 4, 5])
    assert pooled(hidden, real, cu_seqlens, "mean").flatten().tolist() == [2.0, 0.0, 5.0]
    assert pooled(hidden, real, cu_seqlens, "last").flatten().tolist() == [3.0, 0.0, 5.0]


def test_k_means_finds_planted_clusters_by_direction() -> None:
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(5, 16))
    planted = draw.integers(0, 5, 200)
    lengths = draw.uniform(0.1, 10.0, (200, 1))
    vectors = (lengths * (centres[planted] + 0.05 * draw.normal(size=(200, 16)))).astype(np.float32)
    clusters = k_means(vectors, 5, seed=3)
    pairs = {(int(a), int(b)) for a, b in zip(planted, clusters.of, strict=True)}
    assert len(pairs) == 5
    again = k_means(vectors, 5, seed=3)
    assert np.array_equal(again.of, clusters.of) and np.array_equal(again.distance, clusters.distance)


def test_more_clusters_than_samples_leave_each_its_own() -> None:
    vectors = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    assert sorted(k_means(vectors, 7, seed=1).of) == list(range(7))
    selector = ClusterLessSelector([0] * 8, None, None, "", None, target(), n_clusters=9)  # type: ignore[arg-type]
    assert selector.n_clusters == 8


def test_representatives_and_picks_are_the_nearest_of_the_best() -> None:
    clusters = Clusters(np.array([2, 0, 2, 0, 2]), np.array([0.3, 0.2, 0.1, 0.0, 0.3], dtype=np.float32))
    assert [ids.tolist() for ids in representatives(clusters, 2)] == [[3, 1], [2, 0]]
    scores = np.array([0.5, -0.1, 0.5, -0.1, 0.5], dtype=np.float32)
    assert best_clusters_first(scores, clusters, 4).tolist() == [2, 0, 4, 3]


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"n_clusters": 0}, "cluster_less: n_clusters: expected at least 1, got 0"),
        ({"n_clusters": 4, "representatives": 0}, "cluster_less: representatives: expected at least 1, got 0"),
        (
            {"n_clusters": 4, "pooling": "meen"},
            "cluster_less: pooling: 'meen' (did you mean 'mean'?); valid: mean, last, trained, weighted",
        ),
    ],
)
def test_wrong_params(params: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as error:
        ClusterLessSelector([0] * 8, None, None, "", None, target(), **params)  # type: ignore[arg-type]
    assert str(error.value) == text


def test_without_faiss_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_less_selector, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs faiss: pip install 'dataflex\[cluster\]'"):
        ClusterLessSelector([0] * 8, None, None, "", None, target(), n_clusters=2)  # type: ignore[arg-type]
