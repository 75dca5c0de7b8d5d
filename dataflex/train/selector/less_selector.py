"""`less`: the samples whose next Adam step helps the target most (Xia et al., arXiv 2402.04333)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.registry import register_selector
from dataflex.ops.projection.project_kinds import PROJECTIONS, check_proj_dim
from dataflex.scoring.checks.self_check import check_one_sample
from dataflex.scoring.decide.table import ArrayTable, ScoreTable
from dataflex.scoring.gradients.cosines import cosines, exact_cosines, mean_unit_rows
from dataflex.scoring.gradients.exact import exact_dots, mean_directions
from dataflex.scoring.gradients.layers import LayerRule
from dataflex.scoring.gradients.spec import FeatureSpec
from dataflex.scoring.kept.sharded import ScoringPasses
from dataflex.scoring.scorer import Scorer
from dataflex.train.selector.target_selector import TargetSelector
from dataflex.utils import dist
from dataflex.utils.errors import UserError, nearest

ADAM_FORMS = {"official": "adam_less", "optimizer": "adam"}
MOST_DIRECTIONS = 64


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
class LessSelector(TargetSelector):
    """By cosine between a sample's Adam-preconditioned gradient and the target's gradients.

    eval_dataset: the target. subtask_column, aggregate, per, vote_share: see `TargetSelector`. gradient_type: adam (as
    the paper) or sgd for the train side. adam_form: ``official`` (as the paper's code: no bias correction, eps inside
    the root) or ``optimizer`` (the true update of this run's optimizer). scoring: ``projected`` (to proj_dim numbers by
    ``projection``; the kinds are those of `dataflex.ops.projection.project_kinds`, seed: of the projection) or
    ``exact`` (no projection; one direction of the trained parameters' size for each column stays in memory). layers,
    layer_weights: see `LayerRule`. accumulate: decide by the sum over this run's decisions so far of learning rate x
    score, column by column (equation 3 of the paper, over decisions instead of epochs). self_check: compare one sample
    with plain autograd before the first decision. passes: runs the pass over the pool shard by shard.
    """

    decides_by = TargetSelector.decides_by | {"accumulate", "self_check"}

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
        aggregate: str = "max",
        per: str = "subtask",
        vote_share: float | None = None,
        accumulate: bool = False,
        self_check: bool = True,
        seed: int = 42,
    ) -> None:
        self.spec = feature_spec(gradient_type, adam_form, scoring, projection, proj_dim, layers, layer_weights, seed)
        super().__init__(
            dataset,
            accelerator,
            data_collator,
            cache_dir,
            name="less",
            target=eval_dataset,
            subtask_column=subtask_column,
            aggregate=aggregate,
            per=per,
            vote_share=vote_share,
        )
        self.scorer, self.seed = scorer, seed
        self.accumulate, self.unchecked = accumulate, self_check
        self.total: NDArray[np.float32] | None = None
        self.passes = passes or ScoringPasses()
        if not self.spec.proj_dim and self.passes.keep_features:
            raise UserError("less: keep_features: exact scoring has no features to keep; use scoring: projected")
        if not self.spec.proj_dim and per == "target" and self.width > MOST_DIRECTIONS:
            raise UserError(
                f"less: per: target with scoring: exact keeps a copy of the trained parameters for each sample of the "
                f"target, which has {self.width:,} ({MOST_DIRECTIONS} at most); use scoring: projected"
            )

    def table_at(self, step_id: int) -> ScoreTable | None:
        if self.unchecked:
            check_one_sample(self.scorer, self.dataset, self.spec)
            self.unchecked = False
        table = self.table()
        return self._accumulated(table) if self.accumulate else table

    def each(self) -> NDArray[np.float32] | None:
        if self.accumulate:
            raise UserError(
                "less: accumulate: sums over the decisions of a run, and a score is of one model; set it false, score "
                "several checkpoints and let dataflex-cli select sum them (select_from, select_weights)"
            )
        return super().each()

    def use_plain_gradient(self) -> bool:
        """Go by the plain gradient, for weights that come without Adam's moments; whether that changes anything."""
        changes = self.spec.adam is not None
        self.spec = replace(self.spec, adam=None)
        return changes

    def table(self) -> ScoreTable | None:
        directions, spec, target = self.target_directions(), self.spec, self.target_identity
        if spec.proj_dim:
            return self.passes.gradient_table(
                self.scorer,
                self.dataset,
                lambda features: cosines(features, directions),
                self.width,
                target=target,
                **spec.projected(),
            )

        def exact(ids: NDArray[np.int64]) -> NDArray[np.float32]:
            return exact_cosines(
                *exact_dots(self.scorer, self.dataset, directions, ids, adam=spec.adam, layers=spec.layers)
            )

        moments = spec.adam is not None
        return self.passes.table(self.scorer, self.dataset, exact, self.width, target=target, moments=moments)

    def target_directions(self) -> Any:
        """What samples are compared with: of each column the mean unit gradient of its targets."""
        if not self.spec.proj_dim:
            return mean_directions(self.scorer, self.target, self.columns, layers=self.spec.layers)
        features = self.scorer.gradient_features(self.target, **self.spec.of_target().projected())
        return mean_unit_rows(features, self.columns).to(self.scorer.device)

    def _accumulated(self, table: ScoreTable | None) -> ScoreTable | None:
        """The sum with this decision's part, on rank 0; the plain scores while every learning rate so far was 0."""
        rate = np.float32(self.scorer.engine.get_lr()[0])
        if table is None:
            return None
        if self.total is None:
            self.total = np.zeros(table.shape, dtype=np.float32)
        for start, block in table.blocks():
            self.total[start : start + len(block)] += rate * block
        return ArrayTable(self.total) if self.total.any() else table

    def state_dict(self) -> dict[str, Any]:
        """``total``: float32 [n, columns], the sum over decisions; rank 0's is saved."""
        return {} if self.total is None else {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "total" not in state:
            return
        total, wanted = np.asarray(state["total"], dtype=np.float32), (len(self.dataset), self.width)
        if total.ndim == 1 and self.width == 1:  # of a version that summed the maximum over the subtasks
            total = total[:, None]
        if total.shape != wanted:
            raise UserError(
                f"less: accumulate: the checkpoint's sum over decisions has the shape {total.shape}, here it is of "
                f"{wanted[0]:,} samples for {wanted[1]:,} columns each (older versions kept one number a sample); "
                "start this run anew, or go on with accumulate: false"
            )
        self.total = np.array(total) if dist.is_main() else None


def _choice(key: str, value: str, valid: Any) -> None:
    if value not in valid:
        raise UserError(f"less: {key}: '{value}'{nearest(value, valid)}; valid: {', '.join(valid)}")
