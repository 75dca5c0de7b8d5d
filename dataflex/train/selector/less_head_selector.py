"""`less_head`: a cheap stand-in for `less`, by the gradient of the output layer alone and without a backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.core.registry import register_selector
from dataflex.forward.fused import FusedHead
from dataflex.forward.head import UnknownHead
from dataflex.ops.projection.project_kinds import check_proj_dim
from dataflex.scoring.kept.sharded import ScoringPasses
from dataflex.scoring.passes.head_pass import HeadFeatures
from dataflex.scoring.scorer import Scorer
from dataflex.train.selector.base_selector import Selector
from dataflex.train.selector.less_selector import (
    cosine_scores,
    finite,
    pick_best,
    subtask_ids,
    target_directions,
    target_identity,
)
from dataflex.utils.errors import UserError


@register_selector("less_head")
class LessHeadSelector(Selector):
    """Top-k by cosine between the output layer's gradient for a sample and for the target's samples.

    The gradient of a sample's loss by the output layer is sum_t (p_t - y_t) h_t^T: it is made in the sweep that makes
    the losses, so that scoring is a forward. It is a proxy: it knows nothing of the layers below and nothing of Adam's
    moments, and ranks samples otherwise than `less` does over LoRA layers.

    eval_dataset: the target; its domains are the subtasks, or with ``subtask_column`` the values of that column.
    sketch_dim: numbers that the vocabulary is folded to, a power of two. proj_dim: of a sample's feature. seed: of both
    projections. open_head: the model's output layer, or UnknownHead.
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
        open_head: Callable[[], FusedHead],
        passes: ScoringPasses | None = None,
        sketch_dim: int = 2048,
        proj_dim: int = 8192,
        subtask_column: str | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__(dataset, accelerator, data_collator, cache_dir)
        if eval_dataset is None or len(eval_dataset) == 0:
            raise UserError("less_head: eval_dataset: the target is empty; set eval_dataset or val_size")
        if not isinstance(sketch_dim, int) or sketch_dim < 2 or sketch_dim & (sketch_dim - 1):
            raise UserError(f"less_head: sketch_dim: expected a power of two >= 2, got {sketch_dim}")
        try:
            check_proj_dim("xorfold", proj_dim)
            head = open_head()
        except ValueError as exc:
            raise UserError(f"less_head: {exc}") from exc
        except UnknownHead as exc:
            raise UserError(f"less_head: needs a linear output layer: {exc}") from exc
        self.scorer, self.target, self.seed = scorer, eval_dataset, seed
        self.features = HeadFeatures(head, sketch_dim, proj_dim, seed)
        self.subtasks = subtask_ids(eval_dataset, subtask_column)
        self.passes = passes or ScoringPasses()

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        scores = self.once(step_id, lambda: finite(self.scores(), "less_head", step_id))
        return pick_best(self, scores, num_samples, kwargs.get("domain_counts"))

    def scores(self) -> NDArray[np.float32]:
        """Score of every sample of the pool with the model as it is now, float32 [n]."""
        directions = target_directions(self.features.of_samples(self.scorer, self.target), self.subtasks)

        def score(ids: NDArray[np.int64]) -> NDArray[np.float32]:
            features = self.features.of_samples(self.scorer, self.dataset, ids)
            return cosine_scores(torch.from_numpy(features), directions).numpy()

        return self.passes.scores(self.scorer, self.dataset, score, target=target_identity(self.target, self.subtasks))
