"""The loss of every token of every sample, kept on disk: a reference model's, for excess losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dataflex import __version__
from dataflex.ops import SampleLoss
from dataflex.scoring.batches import Ids, sample_lengths
from dataflex.scoring.gather import merge
from dataflex.scoring.kept.sharded import end_here
from dataflex.scoring.kept.store import DEFAULT_SHARD, Parts, ShardStore, StoreReader
from dataflex.scoring.scorer import Scorer
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.stopping import Stop

Floats = NDArray[np.float32]
POOL = "pool"


def write_token_losses(
    scorer: Scorer,
    pool: Any,
    folder: Path,
    fingerprint: Parts,
    shard_samples: int = DEFAULT_SHARD,
    stop: Stop | None = None,
) -> None:
    """Score every sample of ``pool`` and keep its tokens' losses in ``folder``, shard by shard; a collective.

    fingerprint: what they are made from, besides the pool and the version of dataflex. Whole shards of an interrupted
    call are taken up; those of another fingerprint are written anew. A shard holds ``values`` float32 [tokens] and
    ``offsets`` int64 [samples + 1].
    """
    ids = np.arange(len(pool), dtype=np.int64)
    store = ShardStore(
        Path(folder), {**fingerprint, POOL: pool.fingerprint, "dataflex": __version__}, ids, shard_samples
    )
    if dist.is_main():
        store.resume("values", "offsets")
    done = dist.broadcast_object(set(store.shards))
    missing = [index for index in range(len(store)) if index not in done]
    stop = stop or Stop()
    with stop.heeding():
        for place, index in enumerate(missing, start=1):
            values, offsets = _token_losses(scorer, pool, ids[store.places(index)])
            if dist.is_main():
                store.write(index, {"values": values, "offsets": offsets})
            end_here(stop, store, len(done) + place)


def _token_losses(scorer: Scorer, pool: Any, ids: Ids) -> tuple[Floats, Ids]:
    """Losses of the tokens of ``ids``, one sample after the other, and where each sample begins."""
    lengths = sample_lengths(pool, ids)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    values = np.zeros(offsets[-1], dtype=np.float32)

    def keep(places: Ids, losses: SampleLoss, cu_seqlens: Tensor) -> None:
        tokens = losses.token_loss.float().cpu().numpy()
        for place, start in zip(places, cu_seqlens[:-1].tolist(), strict=True):
            values[offsets[place] : offsets[place + 1]] = tokens[start : start + lengths[place]]

    scorer.stream_losses(pool, ids, keep)
    return merge(values, scorer.device), offsets


class TokenLossStore:
    """Reads what `write_token_losses` wrote; nothing is held in memory."""

    def __init__(self, reader: StoreReader) -> None:
        self.reader = reader

    @classmethod
    def open(cls, folder: str | Path, pool: Any) -> TokenLossStore:
        """UserError where ``folder`` holds no whole store, or that of another pool."""
        reader = StoreReader(Path(folder))
        if reader.parts.get(POOL) != pool.fingerprint:
            raise UserError(
                f"{folder}: these token losses were made from other data or another tokenisation (pool "
                f"{reader.parts.get(POOL)}, here {pool.fingerprint}); make them anew with the same datasets, "
                "template and cutoff_len: dataflex-cli score CFG score_token_losses=true"
            )
        return cls(reader)

    def __len__(self) -> int:
        return self.reader.count

    def of(self, sample_ids: Any) -> list[Floats]:
        """For each sample id float32 [its tokens]: position t holds the loss of predicting token t + 1.

        0 where that token does not count, and at the last position: aligned with the shifted labels.
        """
        shards, rows = np.divmod(np.asarray(sample_ids, dtype=np.int64), self.reader.shard_samples)
        found = []
        for shard, row in zip(shards.tolist(), rows.tolist(), strict=True):
            start, stop = self.reader.read(shard, "offsets")[row : row + 2]
            found.append(np.array(self.reader.read(shard, "values")[start:stop], dtype=np.float32))
        return found
