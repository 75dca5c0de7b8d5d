"""`tsds`: samples drawn by how much of the target they stand for, near-duplicates as one (arXiv 2410.11303)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.plan import generator
from dataflex.core.registry import register_selector
from dataflex.core.sampling import weighted_draw
from dataflex.scoring.decide.tsds import LEAST, at_most, pool_probabilities
from dataflex.scoring.kept.sharded import ScoringPasses
from dataflex.scoring.scorer import Scorer
from dataflex.train.selector.base_selector import Selector
from dataflex.train.selector.embeddings import Embedded, Embeddings, check_how
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

Wide = NDArray[np.float64]


@register_selector("tsds")
class TsdsSelector(Selector):
    """Draws with the probabilities of `dataflex.scoring.decide.tsds`, by default with replacement.

    A sample that is drawn twice is trained on twice. eval_dataset: the target. max_k: neighbours of each sample of the
    target that may get mass. kde_k: of the neighbours' neighbours, how many count for a density. sigma: how far a
    near-duplicate is at most, a distance of unit vectors; 0: none is one. alpha: 1: only the nearest get mass, 0: as
    many as may. c: scales what closeness costs. replacement: False: each sample once at most. seed: of the draw.
    pooling, layer, embedding_model, refresh, open_embedder: see `Embeddings`. passes: keeps the pool's embeddings.
    """

    limit, draws, embeds = "max_k", True, True

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
        max_k: int = 5000,
        kde_k: int = 1000,
        sigma: float = 0.75,
        alpha: float = 0.6,
        c: float = 5.0,
        replacement: bool = True,
        pooling: str = "mean",
        layer: int = -1,
        embedding_model: str | None = None,
        refresh: str = "every_update",
        seed: int = 42,
    ) -> None:
        super().__init__(dataset, accelerator, data_collator, cache_dir)
        if eval_dataset is None or len(eval_dataset) == 0:
            raise UserError("tsds: eval_dataset: the target is empty; set eval_dataset or val_size")
        _check_numbers(max_k, kde_k, sigma, alpha, c)
        how: dict[str, Any] = {"pooling": pooling, "layer": layer, "refresh": refresh}
        self.embeddings = Embeddings(
            "tsds", dataset, eval_dataset, scorer, passes, open_embedder, embedding_model=embedding_model, **how
        )
        self.passes, self.scores_once = self.embeddings.passes, self.embeddings.once
        self.max_k, self.kde_k = (at_most(count, len(dataset)) for count in (max_k, kde_k))
        if self.max_k < max_k or self.kde_k < kde_k:
            logger.info(
                f"tsds: max_k {self.max_k:,} and kde_k {self.kde_k:,}, not {max_k:,} and {kde_k:,}: a tenth of the "
                f"pool's {len(dataset):,} samples at most ({LEAST} at least)"
            )
        if self.max_k < max_k:
            self.limit_advice = "a tenth of the pool is the most: set replacement: true, or lower update_step"
        self.neighbours = self.max_k
        self.sigma, self.alpha, self.c = sigma, alpha, c
        self.replacement, self.seed = replacement, seed
        self.most_picks = self.max_k * len(eval_dataset)

    @classmethod
    def check_values(cls, params: Mapping[str, Any]) -> None:
        """UserError for values that cannot be."""
        _check_numbers(*(params[key] for key in ("max_k", "kde_k", "sigma", "alpha", "c")))
        check_how("tsds", params["pooling"], params["refresh"])

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        shares = self.once(step_id, self.probabilities)
        draw = generator(self.seed, "tsds", step_id)
        picks = weighted_draw(shares, num_samples, replacement=self.replacement, draw=draw)
        self.metric, self.scored = {"score": shares[picks].tolist()}, {"score": shares}
        return picks.tolist()

    def scores(self) -> NDArray[np.float32]:
        """Probability of every sample of the pool with the model as it is now, float32 [n]."""
        return self.probabilities().astype(np.float32)

    def probabilities(self) -> Wide:
        """The same in float64, of sum 1; a collective. Zeros where a pass only tries what it takes."""
        found = self.embeddings.embed()
        return np.zeros(len(self.dataset)) if found is None else self.probabilities_of(found)

    def probabilities_of(self, found: Embedded) -> Wide:
        """`probabilities` of vectors at hand; a collective."""
        how: dict[str, Any] = {"sigma": self.sigma, "alpha": self.alpha, "c": self.c}
        device = self.embeddings.scorer.device
        return pool_probabilities(*found, device, max_k=self.max_k, kde_k=self.kde_k, **how)

    def state_dict(self) -> dict[str, Any]:
        return self.embeddings.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.embeddings.load_state_dict(state)


def _check_numbers(max_k: Any, kde_k: Any, sigma: Any, alpha: Any, c: Any) -> None:
    for key, count, least in (("max_k", max_k, LEAST), ("kde_k", kde_k, 1)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise UserError(f"tsds: {key}: expected a whole number >= {least}, got {count}")
    if not (0 <= alpha <= 1 and sigma >= 0 and c > 0):
        raise UserError(
            f"tsds: expected alpha from 0 to 1, sigma >= 0 and c > 0, got alpha {alpha}, sigma {sigma}, c {c}"
        )
