"""The base class of selectors: they say which samples the next phase trains on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.plan import Ids, epoch_stream, generator
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

__all__ = ["Selector", "logger"]


@dataclass(frozen=True)
class Served:
    """Which subtask of the target each pick serves.

    names: of the subtasks. of_picks: int64 [k]. score: [k], each one's for that subtask. advice: what to do where a
    subtask gets too few.
    """

    names: list[str]
    of_picks: Ids
    score: NDArray[Any]
    advice: str


class Selector(ABC):
    """Decides which samples are trained on.

    dataset: the training pool; its positions are the sample ids. accelerator: `core.context.Accelerator`.
    data_collator: list of samples to a padded batch. cache_dir: a folder for the selector's own files.

    ``replacement``: whether `select` may return an id more than once (else that is an error).
    ``keep_order``: train in the returned order instead of a shuffled one.
    ``takes_domain_counts``: whether `select` heeds ``domain_counts``, so that a mixer can be combined with it.
    ``most_picks``: how many different samples a decision can take at most, where that is known before the pool is
    looked at; ``limit`` is the param that says so, and ``limit_advice`` what to do then.
    ``draws``: whether its ``scores()`` are probabilities, by which `dataflex-cli select` draws.
    ``decides_by``: params that say what is taken by the scores, not what these are: kept scores serve all their values.
    ``embeds``: whether it goes by ``embeddings`` (`train.selector.embeddings.Embeddings`) alone, and makes of them its
    ``table_of`` (a `TargetSelector`) or ``probabilities_of`` (one that ``draws``): for `dataflex-cli embed`. Where its
    param ``embedding_model`` is set, `score` and `embed` load no model in training.
    ``neighbours``: of such a selector, how many of the samples nearest to each of the target's it asks for; None: all.
    ``scores_once``: whether one pass over the pool, at the first decision, serves all.
    ``metric``: after `select`, per returned sample: what the decision was made from; written to decisions/.
    ``scored``: after `select`, {column: array [pool]}: the same for every sample of the pool, for the decision's table;
    ``score`` is the one that it ranks by (NaN: not scored).
    ``served``: after `select`, where picks are made for subtasks of a target: which of them, in the order of the picks.
    """

    replacement: bool = False
    keep_order: bool = False
    takes_domain_counts: bool = False
    decides_by: frozenset[str] = frozenset()
    embeds: bool = False
    neighbours: int | None = None
    scores_once: bool = False
    most_picks: int | None = None
    limit: str = ""
    limit_advice: str = "raise it or lower update_step"
    draws: bool = False
    _made: tuple[int, Any] | None = None

    def __init__(self, dataset: Any, accelerator: Any, data_collator: Any, cache_dir: Any) -> None:
        self.dataset = dataset
        self.accelerator = accelerator
        self.data_collator = data_collator
        self.cache_dir = cache_dir
        self.seed = 42
        self.metric: dict[str, list[Any]] = {}
        self.scored: dict[str, NDArray[Any]] = {}
        self.served: Served | None = None

    def warmup(self, num_samples: int, replacement: bool = False) -> list[int]:
        """Sample ids for the warm-up, for a selector that overrides it or calls it.

        A run whose selector does not override this draws them from its own seed, as static training does. This
        one draws from ``self.seed``: UserError for more than the pool holds without replacement.
        """
        size = len(self.dataset)
        if replacement:
            return generator(self.seed, "warmup").integers(0, size, num_samples).tolist()
        if num_samples > size:
            raise UserError(f"warm-up: cannot draw {num_samples} samples without replacement from {size}")
        return epoch_stream(size, self.seed, "warmup", 0, num_samples).tolist()

    @abstractmethod
    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        """Return ``num_samples`` sample ids; called on every rank, rank 0's answer counts.

        model: the Hugging Face model (sharded under ZeRO-3: use the injected ``scorer`` to run it).
        step_id: optimizer steps done. Where samples are packed it is called again at the same step for another number,
        until the picks fill their packs: keep what is costly with `once`. kwargs: current_update_times, update_times,
        tokenizer, and under a mixer domain_counts, int64 [K]: how many of the samples must be of each domain.
        """

    def once(self, step_id: int, make: Callable[[], Any]) -> Any:
        """``make()``, made once for a decision: where samples are packed, `select` is asked several times at a step."""
        if self._made is None or self._made[0] != step_id:
            self._made = step_id, make()
        return self._made[1]

    def forget(self) -> None:
        """Drop what `once` has kept; called after each decision."""
        self._made = None

    def pick_by_domain(self, count: int, domain_counts: Ids | None, pick: Callable[[Ids, int], Ids]) -> Ids:
        """``pick(ids, count)`` of the whole pool, or with ``domain_counts`` of each domain in turn, int64 [count].

        pick: candidates int64 [n] and a count to that many of them.
        """
        if domain_counts is None:
            return pick(np.arange(len(self.dataset), dtype=np.int64), count)
        domains = np.asarray(self.dataset.domain_ids)
        return np.concatenate([pick(np.flatnonzero(domains == d), int(n)) for d, n in enumerate(domain_counts)])

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, the same on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (optional to override)
        """Take back what `state_dict` returned."""
