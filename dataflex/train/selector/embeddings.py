"""What selectors by embeddings share: vectors of the pool and of the target, from the model in training or another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataflex.scoring.batches import Ids
from dataflex.scoring.kept.sharded import ScoringPasses
from dataflex.scoring.kept.vectors import Vectors
from dataflex.scoring.passes.embed_pass import POOLINGS, embeddings
from dataflex.scoring.passes.hidden_states import check_layer, decoder_of
from dataflex.scoring.scorer import Scorer
from dataflex.utils.errors import UserError, nearest

Floats = NDArray[np.float32]
REFRESH = ("every_update", "once")


def check_how(name: str, pooling: Any, refresh: Any) -> None:
    """UserError, in the name of the selector, for what is none of `POOLINGS` or `REFRESH`."""
    for key, value, valid in (("pooling", pooling, POOLINGS), ("refresh", refresh, REFRESH)):
        if value not in valid:
            raise UserError(f"{name}: {key}: '{value}'{nearest(str(value), valid)}; valid: {', '.join(valid)}")


class Embedded(NamedTuple):
    """Unit vectors of the pool's samples, and of the target's, float32 [M, d]; a vector of zeros stays one."""

    pool: Vectors
    target: Floats


class Embeddings:
    """Embeds a pool and a target for a selector called ``name``.

    pooling: one of `POOLINGS`. layer: whose hidden states, from 1, or -1 for the last. embedding_model: a folder or a
    name of the hub, whose model embeds in place of the one in training. refresh: ``every_update`` or ``once``, at the
    first decision; another model's vectors never change. open_embedder: makes a
    `dataflex.engine.models.embedder.Embedder` of such a name. passes: keeps the pool's vectors, shard by shard.
    """

    def __init__(
        self,
        name: str,
        dataset: Any,
        target: Any,
        scorer: Scorer,
        passes: ScoringPasses | None,
        open_embedder: Callable[[str], Any] | None,
        *,
        pooling: str,
        layer: int,
        embedding_model: str | None,
        refresh: str,
    ) -> None:
        check_how(name, pooling, refresh)
        self.passes = passes or ScoringPasses()
        if self.passes.keep_features:
            raise UserError(f"{name}: keep_features: embeddings are kept in any case; drop it")
        self.embedder: Any = None
        if embedding_model is None:
            check_layer(decoder_of(scorer.engine.module), layer, name)
        else:
            assert open_embedder is not None, "who names a model offers what opens it"
            self.embedder = open_embedder(embedding_model)
            self.embedder.check(pooling, layer, name)
        self.name, self.dataset, self.target, self.scorer = name, dataset, target, scorer
        self.pooling, self.layer, self.refresh = pooling, layer, refresh
        self.once = self.embedder is not None or refresh == "once"
        self._kept: Embedded | None = None

    def embed(self) -> Embedded | None:
        """The vectors with the model as it is now, or those that stay; None where a pass only tries what it takes.

        A collective.
        """
        if self._kept is not None:
            return self._kept
        pool = self._pool()
        if self.passes.probe is not None:
            return None
        found = Embedded(pool, self._vectors(self.target, np.arange(len(self.target), dtype=np.int64)))
        if self.embedder is not None:
            self.embedder.close()
        if self.once:
            self._kept = found
        return found

    def _pool(self) -> Vectors:
        return self.passes.vectors(
            self.scorer,
            self.dataset,
            lambda ids: self._vectors(self.dataset, ids),
            width=self._width,
            made_from=self._made_from,
        )

    @property
    def _width(self) -> int:
        if self.embedder is not None:
            return int(self.embedder.width)
        config: Any = self.scorer.engine.module.config
        return int(config.get_text_config().hidden_size)

    def _made_from(self) -> dict[str, str]:
        weights = self.passes.weights(False) if self.embedder is None else self.embedder.identity()
        return {**weights, "pooling": self.pooling, "layer": str(self.layer)}

    def _vectors(self, dataset: Any, ids: Ids) -> Floats:
        """Float32 [n, d]. UserError where one is not finite."""
        how: dict[str, Any] = {"pooling": self.pooling, "layer": self.layer}
        if self.embedder is None:
            found = embeddings(self.scorer, dataset, ids, unit=True, **how)
        else:
            found = self.embedder.embeddings(dataset, ids, **how)
        bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
        if len(bad):
            of = "the target" if dataset is self.target else "the pool"
            raise UserError(f"{self.name}: embeddings of sample ids {ids[bad[:16]].tolist()} of {of} are not finite")
        return found

    def state_dict(self) -> dict[str, Any]:
        """The first decision's vectors, where later ones use them; another model's are made again. A collective."""
        if self._kept is None or self.embedder is not None:
            return {}
        every = np.arange(len(self.dataset), dtype=np.int64)
        return {"pool": self._kept.pool.rows(every, self.scorer.device), "target": self._kept.target}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._kept = None
        if state:
            pool, target = (np.asarray(state[key], dtype=np.float32) for key in ("pool", "target"))
            self._kept = Embedded(Vectors.of(pool, self.passes.shard_samples), target)
