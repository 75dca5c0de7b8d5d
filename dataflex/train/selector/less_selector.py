"""`less`: the samples whose next Adam step helps the target most (Xia et al., arXiv 2402.04333)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex.core.registry import register_selector
from dataflex.scoring.scorer import Scorer
from dataflex.scoring.sharded import ScoringPasses
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


def top_k(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices of the ``count`` largest scores, best first; ties by index, NaN last."""
    return np.argsort(-scores, kind="stable")[:count].astype(np.int64)


@register_selector("less")
class LessSelector(Selector):
    """Top-k by cosine between a sample's Adam-preconditioned gradient and the target's gradients.

    eval_dataset: the target; its domains are the subtasks. gradient_type: adam (as the paper) or sgd for the
    train side. adam_form: ``official`` (as the paper's code: no bias correction, eps inside the root) or
    ``optimizer`` (the true update of this run's optimizer). proj_dim: a power of two. seed: of the projection.
    passes: runs the pass over the pool shard by shard.
    """

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
        proj_dim: int = 8192,
        seed: int = 42,
    ) -> None:
        super().__init__(dataset, accelerator, data_collator, cache_dir)
        if eval_dataset is None or len(eval_dataset) == 0:
            raise UserError("less: eval_dataset: the target is empty; set eval_dataset or val_size")
        _choice("gradient_type", gradient_type, ("adam", "sgd"))
        _choice("adam_form", adam_form, ADAM_FORMS)
        if proj_dim < 2 or proj_dim & (proj_dim - 1):
            raise UserError(f"less: proj_dim: expected a power of two (512, 2048, 8192), got {proj_dim}")
        self.scorer, self.target = scorer, eval_dataset
        self.passes = passes or ScoringPasses()
        self.adam = ADAM_FORMS[adam_form] if gradient_type == "adam" else None
        self.proj_dim, self.seed = proj_dim, seed

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        scores = self.scores()
        if not np.isfinite(scores).all():
            bad = np.flatnonzero(~np.isfinite(scores))
            raise UserError(f"less: scores of sample ids {bad[:16].tolist()} are not finite at step {step_id}")
        picks = top_k(scores, num_samples)
        self.metric = {"score": scores[picks].tolist()}
        return picks.tolist()

    def use_plain_gradient(self) -> bool:
        """Go by the plain gradient, for weights that come without Adam's moments; whether that changes anything."""
        changes = self.adam is not None
        self.adam = None
        return changes

    def scores(self) -> NDArray[np.float32]:
        """Score of every sample of the pool with the model as it is now, float32 [n]."""
        features = self.scorer.gradient_features(self.target, proj_dim=self.proj_dim, seed=self.seed)
        directions = target_directions(features, self.target.domain_ids).to(self.scorer.device)
        return self.passes.gradient_scores(
            self.scorer,
            self.dataset,
            lambda batch: cosine_scores(batch, directions),
            target=self.target.fingerprint,
            proj_dim=self.proj_dim,
            seed=self.seed,
            adam=self.adam,
        )


def _choice(key: str, value: str, valid: Any) -> None:
    if value not in valid:
        raise UserError(f"less: {key}: '{value}'{nearest(value, valid)}; valid: {', '.join(valid)}")
