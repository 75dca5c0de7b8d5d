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
from dataflex.scoring.decide.table import ScoreTable
from dataflex.scoring.gradients.cosines import cosines, mean_unit_rows
from dataflex.scoring.kept.sharded import ScoringPasses
from dataflex.scoring.passes.head_pass import HeadFeatures
from dataflex.scoring.scorer import Scorer
from dataflex.train.selector.target_selector import TargetSelector
from dataflex.utils.errors import UserError


@register_selector("less_head")
class LessHeadSelector(TargetSelector):
    """By cosine between the output layer's gradient for a sample and for the target's samples.

    The gradient of a sample's loss by the output layer is sum_t (p_t - y_t) h_t^T: it is made in the sweep that makes
    the losses, so that scoring is a forward. It is a proxy: it knows nothing of the layers below and nothing of Adam's
    moments, and ranks samples otherwise than `less` does over LoRA layers.

    eval_dataset: the target. subtask_column, aggregate, per, vote_share: see `TargetSelector`.
    sketch_dim: numbers that the vocabulary is folded to, a power of two. proj_dim: of a sample's feature. seed: of both
    projections. open_head: the model's output layer, or UnknownHead.
    """

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
        aggregate: str = "max",
        per: str = "subtask",
        vote_share: float | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__(
            dataset,
            accelerator,
            data_collator,
            cache_dir,
            name="less_head",
            target=eval_dataset,
            subtask_column=subtask_column,
            aggregate=aggregate,
            per=per,
            vote_share=vote_share,
        )
        if not isinstance(sketch_dim, int) or sketch_dim < 2 or sketch_dim & (sketch_dim - 1):
            raise UserError(f"less_head: sketch_dim: expected a power of two >= 2, got {sketch_dim}")
        try:
            check_proj_dim("xorfold", proj_dim)
            head = open_head()
        except ValueError as exc:
            raise UserError(f"less_head: {exc}") from exc
        except UnknownHead as exc:
            raise UserError(f"less_head: needs a linear output layer: {exc}") from exc
        self.scorer, self.seed = scorer, seed
        self.features = HeadFeatures(head, sketch_dim, proj_dim, seed)
        self.passes = passes or ScoringPasses()

    def table(self) -> ScoreTable | None:
        directions = mean_unit_rows(self.features.of_samples(self.scorer, self.target), self.columns)

        def score(ids: NDArray[np.int64]) -> NDArray[np.float32]:
            features = self.features.of_samples(self.scorer, self.dataset, ids)
            found: NDArray[np.float32] = cosines(torch.from_numpy(features), directions).numpy()
            return found

        return self.passes.table(self.scorer, self.dataset, score, self.width, target=self.target_identity)
