"""`rds` and `near`: samples whose embeddings are like the target's, each sample of which is served in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dataflex.core.registry import register_selector
from dataflex.scoring.batches import Ids
from dataflex.scoring.decide.neighbours import nearest
from dataflex.scoring.decide.table import ScoreTable
from dataflex.scoring.decide.vector_table import VectorTable
from dataflex.scoring.gradients.cosines import mean_unit_rows
from dataflex.scoring.kept.sharded import ScoringPasses
from dataflex.scoring.scorer import Scorer
from dataflex.train.selector.embeddings import Embedded, Embeddings, check_how
from dataflex.train.selector.target_selector import TargetSelector, check_shares
from dataflex.utils.errors import UserError


@register_selector("rds")
class RdsSelector(TargetSelector):
    """RDS+ (arXiv 2503.01807): cosines of embeddings, weighted towards the later tokens of prompt and answer.

    ::

        e(x)   = sum_i i h_i / |sum_i i h_i|      h_i: hidden states at the positions i = 1, 2, ... of the sample
        s_ij   = e(x_i) . e(t_j)                  t_j: samples of the target

    Each t_j in turn takes the sample of largest s_ij that is not taken yet; of several subtasks, each in turn and in it
    each of its samples in turn.

    eval_dataset: the target. aggregate, per, subtask_column, vote_share: see `TargetSelector`. pooling, layer,
    embedding_model, refresh, open_embedder: see `Embeddings`. passes: keeps the pool's embeddings.
    """

    called, embeds = "rds", True

    def __init__(
        self,
        dataset: Any,
        accelerator: Any,
        data_collator: Any,
        cache_dir: Any,
        scorer: Scorer,
        eval_dataset: Any,
        passes: ScoringPasses | None = None,
        open_embedder: Callable[[str], Any] | None = None,
        aggregate: str = "round_robin",
        per: str = "target",
        pooling: str = "weighted",
        layer: int = -1,
        embedding_model: str | None = None,
        refresh: str = "every_update",
        subtask_column: str | None = None,
        vote_share: float | None = None,
    ) -> None:
        super().__init__(
            dataset,
            accelerator,
            data_collator,
            cache_dir,
            name=self.called,
            target=eval_dataset,
            subtask_column=subtask_column,
            aggregate=aggregate,
            per=per,
            vote_share=vote_share,
        )
        how: dict[str, Any] = {"pooling": pooling, "layer": layer, "refresh": refresh}
        self.embeddings = Embeddings(
            self.called, dataset, eval_dataset, scorer, passes, open_embedder, embedding_model=embedding_model, **how
        )
        self.passes, self.scores_once = self.embeddings.passes, self.embeddings.once

    def table(self) -> ScoreTable | None:
        found = self.embedded = self.embeddings.embed()
        return None if found is None else self.table_of(found)

    def table_of(self, found: Embedded) -> ScoreTable:
        """`table` of vectors at hand, for every rank."""
        targets = found.target
        if self.per == "subtask":
            targets = mean_unit_rows(targets, self.columns).numpy()
        return VectorTable(found.pool, targets, self.embeddings.scorer.device)

    @classmethod
    def check_values(cls, params: Mapping[str, Any]) -> None:
        """UserError for values that cannot be."""
        check_shares(cls.called, params["aggregate"], params["per"], params["vote_share"])
        check_how(cls.called, params["pooling"], params["refresh"])

    def state_dict(self) -> dict[str, Any]:
        return self.embeddings.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.embeddings.load_state_dict(state)


@register_selector("near")
class NearSelector(RdsSelector):
    """The nearest neighbours of each sample of the target, found exactly, dealt to them in turn.

    As `RdsSelector`, with the mean of the hidden states (``pooling``), meant for a model made to embed texts
    (``embedding_model``). max_neighbours: a sample that is among so many nearest of no sample of the target is never
    taken; None: all may be.
    """

    called, limit = "near", "max_neighbours"

    def __init__(
        self,
        dataset: Any,
        accelerator: Any,
        data_collator: Any,
        cache_dir: Any,
        scorer: Scorer,
        eval_dataset: Any,
        passes: ScoringPasses | None = None,
        open_embedder: Callable[[str], Any] | None = None,
        aggregate: str = "round_robin",
        per: str = "target",
        pooling: str = "mean",
        layer: int = -1,
        embedding_model: str | None = None,
        refresh: str = "every_update",
        subtask_column: str | None = None,
        vote_share: float | None = None,
        max_neighbours: int | None = None,
    ) -> None:
        super().__init__(
            dataset,
            accelerator,
            data_collator,
            cache_dir,
            scorer,
            eval_dataset,
            passes,
            open_embedder,
            aggregate,
            per,
            pooling,
            layer,
            embedding_model,
            refresh,
            subtask_column,
            vote_share,
        )
        _check_most(max_neighbours)
        self.max_neighbours = self.neighbours = max_neighbours
        self.most_picks = None if max_neighbours is None else max_neighbours * len(eval_dataset)

    @classmethod
    def check_values(cls, params: Mapping[str, Any]) -> None:
        super().check_values(params)
        _check_most(params["max_neighbours"])

    def candidates(self) -> Ids | None:
        if self.max_neighbours is None or self.embedded is None:
            return None
        pool, target = self.embedded
        most = min(self.max_neighbours, len(pool))
        return np.unique(nearest(pool, target, most, self.embeddings.scorer.device).ids)


def _check_most(max_neighbours: Any) -> None:
    whole = isinstance(max_neighbours, int) and not isinstance(max_neighbours, bool)
    if max_neighbours is not None and not (whole and max_neighbours >= 1):
        raise UserError(f"near: max_neighbours: expected a whole number >= 1, or null, got {max_neighbours}")
