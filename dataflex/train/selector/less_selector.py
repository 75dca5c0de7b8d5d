"""`less`: the samples whose next Adam step helps the target most (Xia et al., arXiv 2402.04333)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex.core.registry import register_selector
from dataflex.ops.projection.project_kinds import PROJECTIONS, check_proj_dim
from dataflex.scoring.checks.self_check import check_one_sample
from dataflex.scoring.gradients.exact import exact_dots, mean_directions
from dataflex.scoring.gradients.layers import LayerRule
from dataflex.scoring.gradients.spec import FeatureSpec
from dataflex.scoring.kept.sharded import ScoringPasses
from dataflex.scoring.scorer import Scorer
from dataflex.train.selector.base_selector import Selector
from dataflex.utils.errors import UserError, nearest

ADAM_FORMS = {"official": "adam_less", "optimizer": "adam"}


def unit_rows(features: Tensor) -> Tensor:
    """Rows of [n, d] scaled to length 1; a row of zeros stays zero."""
    return features / features.norm(dim=1, keepdim=True).clamp_min(torch.finfo(features.dtype).tiny)


def target_directions(features: NDArray[np.float32], subtasks: NDArray[Any]) -> Tensor:
    """Mean unit feature of each subtask, float32 [K, d], from target features [n, d] and subtask ids [n]."""
    unit = unit_rows(torch.from_numpy(features))
    return torch.stack([unit[torch.from_numpy(subtasks == k)].mean(0) for k in np.unique(subtasks)])


def cosine_scores(features: Tensor, directions: Tensor) -> Tensor:
    """Score of each sample, [b]: the maximum over subtasks of its mean cosine with the subtask's targets.

    features: [b, d]; directions: [K, d] from `target_directions` (section 4.2 of the paper: the mean over
    targets of cosines is the product with the mean of unit targets).
    """
    return (unit_rows(features) @ directions.T).max(dim=1).values


def exact_scores(dots: NDArray[np.float32], sqnorm: NDArray[np.float32]) -> NDArray[np.float32]:
    """`cosine_scores` from inner products with the directions [n, K] and squared norms [n]."""
    norm = np.sqrt(np.maximum(sqnorm, np.finfo(np.float32).tiny))
    return dots.max(axis=1) / norm


def top_k(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices of the ``count`` largest scores, best first; ties by index, NaN last."""
    return np.argsort(-scores, kind="stable")[:count].astype(np.int64)


def pick_best(selector: Selector, scores: NDArray[np.float32], num_samples: int, domain_counts: Any) -> list[int]:
    """The samples of the highest scores, of all or of each domain; the selector's record of the decision is made."""
    picks = selector.pick_by_domain(num_samples, domain_counts, lambda ids, count: ids[top_k(scores[ids], count)])
    selector.metric, selector.scored = {"score": scores[picks].tolist()}, {"score": scores}
    return picks.tolist()


def finite(scores: NDArray[np.float32], name: str, step_id: int) -> NDArray[np.float32]:
    """``scores``. UserError, in the name of a selector, where one is not finite."""
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise UserError(f"{name}: scores of sample ids {bad[:16].tolist()} are not finite at step {step_id}")
    return scores


def target_identity(target: Any, subtasks: NDArray[np.int64]) -> str:
    """What kept scores are of, besides the pool and the weights."""
    return f"{target.fingerprint} {hashlib.sha256(subtasks.tobytes()).hexdigest()[:16]}"


def subtask_ids(target: Any, column: str | None) -> NDArray[np.int64]:
    """Which subtask each sample of the target belongs to, int64 [n]: its domain, or the value of its ``column``."""
    if column is None:
        return np.asarray(target.domain_ids, dtype=np.int64)
    values = []
    for i in range(len(target)):
        sample = target[i]
        if column not in sample:
            raise UserError(
                f"less: subtask_column: sample {i} of the target has no '{column}'{nearest(column, sample)}; "
                f"it has {', '.join(sample)}"
            )
        values.append(str(sample[column]))
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def feature_spec(
    gradient_type: str = "adam",
    adam_form: str = "official",
    scoring: str = "projected",
    projection: str = "xorfold",
    proj_dim: int = 8192,
    layers: Sequence[str] | None = None,
    layer_weights: Mapping[str, float] | None = None,
    seed: int = 42,
) -> FeatureSpec:
    """What `LessSelector`'s params of these names mean for the train side. UserError for what does not fit."""
    _choice("gradient_type", gradient_type, ("adam", "sgd"))
    _choice("adam_form", adam_form, ADAM_FORMS)
    _choice("scoring", scoring, ("projected", "exact"))
    _choice("projection", projection, PROJECTIONS)
    if projection == "kronecker" and gradient_type == "adam" and scoring == "projected":
        raise UserError("less: projection: kronecker needs gradient_type: sgd; with adam use xorfold")
    try:
        check_proj_dim(projection, proj_dim)
    except ValueError as exc:
        raise UserError(f"less: {exc}") from exc
    return FeatureSpec(
        adam=ADAM_FORMS[adam_form] if gradient_type == "adam" else None,
        layers=LayerRule.of(layers, layer_weights),
        proj_dim=0 if scoring == "exact" else proj_dim,
        projection=projection,
        seed=seed,
    )


@register_selector("less")
class LessSelector(Selector):
    """Top-k by cosine between a sample's Adam-preconditioned gradient and the target's gradients.

    eval_dataset: the target; its domains are the subtasks, or with ``subtask_column`` the values of that column of
    its samples. gradient_type: adam (as the paper) or sgd for the train side. adam_form: ``official`` (as the
    paper's code: no bias correction, eps inside the root) or ``optimizer`` (the true update of this run's
    optimizer). scoring: ``projected`` (to proj_dim numbers by ``projection``; the kinds are those of
    `dataflex.ops.projection.project_kinds`, seed: of the projection) or ``exact`` (no projection; one direction of the
    trained parameters' size for each subtask stays in memory). layers, layer_weights: see `LayerRule`. accumulate: rank
    by the sum over this run's decisions so far of learning rate x score (equation 3 of the paper, over decisions
    instead of epochs). self_check: compare one sample with plain autograd before the first decision.
    passes: runs the pass over the pool shard by shard.
    """

    takes_domain_counts = True

    def __init__(
        self,
        dataset: Any,
        accelerator: Any,
        data_collator: Any,
        cache_dir: Any,
        scorer: Scorer,
        eval_dataset: Any,
        passes: ScoringPasses | None = None,
        gradient_type: str = "adam",
        adam_form: str = "official",
        scoring: str = "projected",
        projection: str = "xorfold",
        proj_dim: int = 8192,
        layers: Sequence[str] | None = None,
        layer_weights: Mapping[str, float] | None = None,
        subtask_column: str | None = None,
        accumulate: bool = False,
        self_check: bool = True,
        seed: int = 42,
    ) -> None:
        super().__init__(dataset, accelerator, data_collator, cache_dir)
        if eval_dataset is None or len(eval_dataset) == 0:
            raise UserError("less: eval_dataset: the target is empty; set eval_dataset or val_size")
        self.scorer, self.target, self.seed = scorer, eval_dataset, seed
        self.spec = feature_spec(gradient_type, adam_form, scoring, projection, proj_dim, layers, layer_weights, seed)
        self.subtasks = subtask_ids(eval_dataset, subtask_column)
        self.accumulate, self.unchecked = accumulate, self_check
        self.total: NDArray[np.float32] | None = None
        self.passes = passes or ScoringPasses()
        if not self.spec.proj_dim and self.passes.keep_features:
            raise UserError("less: keep_features: exact scoring has no features to keep; use scoring: projected")

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        scores = self.once(step_id, lambda: self._scores_at(step_id))
        return pick_best(self, scores, num_samples, kwargs.get("domain_counts"))

    def _scores_at(self, step_id: int) -> NDArray[np.float32]:
        """What the samples are ranked by at this decision, float32 [n]."""
        if self.unchecked:
            check_one_sample(self.scorer, self.dataset, self.spec)
            self.unchecked = False
        scores = finite(self.scores(), "less", step_id)
        return self._accumulated(scores) if self.accumulate else scores

    def use_plain_gradient(self) -> bool:
        """Go by the plain gradient, for weights that come without Adam's moments; whether that changes anything."""
        changes = self.spec.adam is not None
        self.spec = replace(self.spec, adam=None)
        return changes

    def scores(self) -> NDArray[np.float32]:
        """Score of every sample of the pool with the model as it is now, float32 [n]."""
        return self.pool_scores(self.target_directions())

    def target_directions(self) -> Any:
        """What `pool_scores` compares with: the mean unit gradient of each subtask's targets."""
        if not self.spec.proj_dim:
            return mean_directions(self.scorer, self.target, self.subtasks, layers=self.spec.layers)
        features = self.scorer.gradient_features(self.target, **self.spec.of_target().projected())
        return target_directions(features, self.subtasks).to(self.scorer.device)

    def pool_scores(self, directions: Any) -> NDArray[np.float32]:
        """Scores of the pool's samples, float32 [n]."""
        spec = self.spec
        target = target_identity(self.target, self.subtasks)
        if spec.proj_dim:
            return self.passes.gradient_scores(
                self.scorer,
                self.dataset,
                lambda batch: cosine_scores(batch, directions),
                target=target,
                **spec.projected(),
            )

        def exact(ids: NDArray[np.int64]) -> NDArray[np.float32]:
            return exact_scores(
                *exact_dots(self.scorer, self.dataset, directions, ids, adam=spec.adam, layers=spec.layers)
            )

        return self.passes.scores(self.scorer, self.dataset, exact, target=target, moments=spec.adam is not None)

    def _accumulated(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """The sum with this decision's part; the plain scores while every learning rate so far was 0."""
        rate = np.float32(self.scorer.engine.get_lr()[0])
        self.total = rate * scores if self.total is None else self.total + rate * scores
        return self.total if self.total.any() else scores

    def state_dict(self) -> dict[str, Any]:
        return {} if self.total is None else {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = np.asarray(state["total"], dtype=np.float32) if "total" in state else None


def _choice(key: str, value: str, valid: Any) -> None:
    if value not in valid:
        raise UserError(f"less: {key}: '{value}'{nearest(value, valid)}; valid: {', '.join(valid)}")
