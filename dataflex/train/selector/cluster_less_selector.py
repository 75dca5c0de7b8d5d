"""`cluster_less`: LESS asked about a few representatives of each cluster of the pool instead of every sample."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.core.registry import register_selector
from dataflex.scoring.gradients.cosines import cosines
from dataflex.scoring.passes.embed_pass import POOLINGS, embeddings
from dataflex.scoring.scorer import Scorer
from dataflex.train.selector.base_selector import Served
from dataflex.train.selector.less_selector import LessSelector
from dataflex.utils import dist
from dataflex.utils.errors import UserError, nearest
from dataflex.utils.logging import logger

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
ROUNDS = 25


class Clusters(NamedTuple):
    """Of each sample: its cluster, int64 [n], and its squared distance to the cluster's centre, float32 [n]."""

    of: Ids
    distance: Floats


def k_means(vectors: Floats, count: int, seed: int) -> Clusters:
    """k-means of the directions of ``vectors`` [n, h] into at most ``count`` clusters, by faiss.

    Of a large pool the centres are learnt from 256 samples per cluster, drawn by ``seed``.
    """
    import faiss

    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    learner = faiss.Kmeans(unit.shape[1], count, niter=ROUNDS, seed=seed % 2**31, min_points_per_centroid=1)
    learner.train(unit)
    distance, place = learner.index.search(unit, 1)
    return Clusters(place[:, 0].astype(np.int64), distance[:, 0])


def representatives(clusters: Clusters, count: int) -> list[Ids]:
    """Of each cluster that has members, the ``count`` nearest to its centre, nearest first; ties by sample id."""
    order = np.lexsort((clusters.distance, clusters.of))
    starts = np.flatnonzero(np.diff(clusters.of[order], prepend=-1))
    return [members[:count] for members in np.split(order, starts[1:])]


def best_clusters_first(scores: Floats, clusters: Clusters, count: int) -> Ids:
    """``count`` sample ids by their cluster's score [n], best first, within a cluster the nearest to the centre."""
    return np.lexsort((clusters.distance, clusters.of, -scores))[:count].astype(np.int64)


@register_selector("cluster_less")
class ClusterLessSelector(LessSelector):
    """Samples of the clusters whose representatives LESS scores best; gradients of n_clusters x representatives only.

    The pool's embeddings (hidden states of the last layer through the current model) are clustered by k-means; the
    mean gradient feature of the representatives nearest to a centre stands for the cluster, and is scored as `less`
    scores a sample (arXiv 2402.04333). n_clusters: at most, per decision. representatives: per cluster. pooling:
    ``mean`` or ``last`` token. gradient_type, adam_form, proj_dim, subtask_column, seed: as `less` has them; the seed
    is the clustering's as well.
    """

    def __init__(
        self,
        dataset: Any,
        accelerator: Any,
        data_collator: Any,
        cache_dir: Any,
        scorer: Scorer,
        eval_dataset: Any,
        n_clusters: int = 100,
        representatives: int = 4,
        pooling: str = "mean",
        gradient_type: str = "adam",
        adam_form: str = "official",
        proj_dim: int = 8192,
        subtask_column: str | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__(
            dataset,
            accelerator,
            data_collator,
            cache_dir,
            scorer=scorer,
            eval_dataset=eval_dataset,
            gradient_type=gradient_type,
            adam_form=adam_form,
            proj_dim=proj_dim,
            subtask_column=subtask_column,
            seed=seed,
        )
        if find_spec("faiss") is None:
            raise UserError("cluster_less: needs faiss: pip install 'dataflex[cluster]' (or faiss-cpu)")
        for key, value in (("n_clusters", n_clusters), ("representatives", representatives)):
            if value < 1:
                raise UserError(f"cluster_less: {key}: expected at least 1, got {value}")
        if n_clusters > len(dataset):
            logger.warning(f"cluster_less: n_clusters: {n_clusters}, but the pool has {len(dataset)} samples")
        if pooling not in POOLINGS:
            raise UserError(
                f"cluster_less: pooling: '{pooling}'{nearest(pooling, POOLINGS)}; valid: {', '.join(POOLINGS)}"
            )
        self.n_clusters = min(n_clusters, len(dataset))
        self.representatives, self.pooling = representatives, pooling

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        clusters, rows = self.once(step_id, self._scored)
        scores = rows.max(axis=1)[clusters.of]
        picks = self.pick_by_domain(
            num_samples,
            kwargs.get("domain_counts"),
            lambda ids, count: ids[
                best_clusters_first(scores[ids], Clusters(clusters.of[ids], clusters.distance[ids]), count)
            ],
        )
        serves = rows.argmax(axis=1)[clusters.of[picks]]
        self.served = Served(self.subtasks.names, serves, scores[picks], "use less with aggregate: round_robin")
        self.scored = {"score": scores, "cluster": clusters.of}
        self.metric = {name: values[picks].tolist() for name, values in self.scored.items()}
        self.metric["serves"] = [self.subtasks.names[k] for k in serves]
        return picks.tolist()

    def each(self) -> Floats:
        """Scores of every sample of the pool, those of its cluster, float32 [n, `width`]."""
        clusters, rows = self._scored()
        found: Floats = rows[clusters.of]
        return found

    def _scored(self) -> tuple[Clusters, Floats]:
        """Rank 0's clusters on every rank, and the scores of each for the subtasks [n_clusters, M]."""
        vectors = embeddings(self.scorer, self.dataset, pooling=self.pooling)
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise UserError(f"cluster_less: embeddings of sample ids {bad[:16].tolist()} are not finite")
        found = k_means(vectors, self.n_clusters, self.seed) if dist.is_main() else None
        clusters = dist.broadcast_object(found)
        assert clusters is not None
        rows = self._cluster_rows(clusters)
        bad = np.flatnonzero(~np.isfinite(rows[clusters.of]).all(axis=1))
        if len(bad):
            raise UserError(f"cluster_less: scores of the clusters of sample ids {bad[:16].tolist()} are not finite")
        return clusters, rows

    def _cluster_rows(self, clusters: Clusters) -> Floats:
        """Scores of each cluster for each subtask, float32 [n_clusters, M]; those without members have -inf."""
        chosen = representatives(clusters, self.representatives)
        directions = self.target_directions()
        features = self.scorer.gradient_features(self.dataset, np.concatenate(chosen), **self.spec.projected())
        parts = np.split(features, np.cumsum([len(ids) for ids in chosen])[:-1])
        means = torch.from_numpy(np.stack([part.mean(axis=0) for part in parts]))
        rows = np.full((self.n_clusters, self.width), -np.inf, dtype=np.float32)
        found = cosines(means.to(directions.device), directions).cpu().numpy()
        rows[[int(clusters.of[ids[0]]) for ids in chosen]] = found
        return rows
