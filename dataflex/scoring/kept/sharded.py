"""A pool pass of a selection, shard by shard: what is finished is on disk, and a resumed run takes it up.

A shard is a fixed range of the samples, and its samples are put into batches among themselves, so neither which shards
exist already nor the number of ranks changes a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dataflex import __version__
from dataflex.scoring.batches import Ids, sample_lengths
from dataflex.scoring.decide.table import ArrayTable, ScoreTable, ShardTable, whole
from dataflex.scoring.decide.topk import FEATURES, stream_scores
from dataflex.scoring.kept.probe import Probe, time_batches
from dataflex.scoring.kept.store import DEFAULT_SHARD, Parts, ShardStore, folder_for, ids_part
from dataflex.scoring.kept.vectors import Vectors
from dataflex.scoring.progress import Progress, counted, size
from dataflex.scoring.scorer import Scorer
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger
from dataflex.utils.room import check_room
from dataflex.utils.run_lock import held
from dataflex.utils.stopping import Stop, Stopped

Floats = NDArray[np.float32]
WeightsReader = Callable[[bool], dict[str, str]]
MadeFrom = Callable[[], Parts]
SCORES, EMBEDDINGS = "scores", "embeddings"


def no_weights(moments: bool) -> dict[str, str]:
    """Where nothing is kept, nothing must be known of the weights."""
    return {}


@dataclass
class ScoringPasses:
    """Runs a component's scoring passes and keeps their results under its run folder.

    folder: the run's, or None to keep nothing. component: its name and the params that its
    scores depend on, part of their fingerprint.
    weights: reads the parts of a fingerprint that name the weights as they are now (with Adam's moments where its
    argument is true); a collective. keep_features: write the features too, in fp16, and score those. features_dir:
    where, by default ``features`` in ``folder``. step: optimizer steps done, for the screen. features: on rank 0, the
    store of the last pass that kept features or embeddings. taken_up: on rank 0, samples in shards of earlier starts.
    probe: where it is set, nothing is kept and there is no table. stop: of the run as it is now.
    """

    folder: Path | None = None
    component: str = ""
    weights: WeightsReader = no_weights
    shard_samples: int = DEFAULT_SHARD
    keep_features: bool = False
    features_dir: Path | None = None
    step: Callable[[], int] = lambda: 0
    features: Path | None = None
    taken_up: int = 0
    probe: Probe | None = None
    stop: Callable[[], Stop] = Stop
    _said: bool = False

    def gradient_table(
        self,
        scorer: Scorer,
        dataset: Any,
        score: Callable[[Tensor], Tensor],
        columns: int,
        *,
        target: str,
        proj_dim: int,
        adam: str | None = None,
        **how: Any,
    ) -> ScoreTable | None:
        """`Scorer.gradient_scores` of the whole of ``dataset``: a table [n, columns]; a collective. See `table`.

        score: features [b, proj_dim] to [b, columns]. target: what ``score`` was made from, for the fingerprint. With
        ``keep_features`` the features are stored as fp16 and the scores, of the stored ones, are in memory on rank 0.
        """
        ids = np.arange(len(dataset), dtype=np.int64)
        how |= {"proj_dim": proj_dim, "adam": adam}
        if not self.keep_features or self.probe is not None:
            call = lambda part: scorer.gradient_scores(dataset, score, columns, part, **how)  # noqa: E731
            row_bytes = 2 * proj_dim if self.keep_features else None
            return self._table(scorer, dataset, call, columns, target, adam is not None, row_bytes)
        store = self._store(dataset, ids, self._scored(adam is not None), FEATURES)
        what = f"{self._who()}: features"

        def write(index: int) -> None:
            rows = scorer.gradient_features(dataset, ids[store.places(index)], **how)
            if dist.is_main():
                store.write(index, {FEATURES: rows.astype(np.float16)})

        with held(store.folder, "features_dir") if self.features_dir is not None else nullcontext():
            self._take_up(store, FEATURES)
            self._each_missing(scorer, dataset, store, write, what, 2 * proj_dim)
        self.features = store.folder
        return ArrayTable(stream_scores(store, len(ids), score, columns, scorer.device)) if dist.is_main() else None

    def table(
        self,
        scorer: Scorer,
        dataset: Any,
        call: Callable[[Ids], Floats],
        columns: int,
        *,
        target: str = "",
        moments: bool = False,
    ) -> ScoreTable | None:
        """``call(ids)`` float32 [len(ids), columns] for the shards of ``dataset``, put together; a collective.

        The rows lie in the shards on the disk, and rank 0 alone has the table; without ``folder`` they are in memory,
        on every rank. moments: whether the answer depends on Adam's moments. UserError with ``keep_features``: there
        are none.
        """
        if self.keep_features:
            raise UserError(
                f"keep_features: {self._name()} makes no features with these params (exact scores?); drop it"
            )
        return self._table(scorer, dataset, call, columns, target, moments)

    def scores(
        self, scorer: Scorer, dataset: Any, call: Callable[[Ids], Floats], *, target: str = "", moments: bool = False
    ) -> Floats:
        """`table` of one column, ``call(ids)`` float32 [len(ids)]: the column, float32 [n] on every rank."""
        found = self.table(scorer, dataset, lambda ids: call(ids)[:, None], 1, target=target, moments=moments)
        nothing = np.zeros(len(dataset), dtype=np.float32)  # of a probe
        return dist.broadcast_object(nothing if found is None else whole(found)[:, 0])

    def _table(
        self,
        scorer: Scorer,
        dataset: Any,
        call: Callable[[Ids], Floats],
        columns: int,
        target: str,
        moments: bool,
        row_bytes: int | None = None,
    ) -> ScoreTable | None:
        ids = np.arange(len(dataset), dtype=np.int64)
        row_bytes = row_bytes or 4 * columns
        if self.probe is not None:
            self.probe.row_bytes = row_bytes
            self.probe.kept = "features (fp16)" if self.keep_features else "scores"
            time_batches(self.probe, scorer, dataset, call)
            return None
        made_from = self._scored(moments, target=target, columns=str(columns))
        store = self._store(dataset, ids, made_from, SCORES)
        out = np.zeros((len(ids), columns), dtype=np.float32) if self.folder is None else None

        def score(index: int) -> None:
            where = store.places(index)
            rows = call(ids[where])
            if out is not None:
                out[where] = rows
            elif dist.is_main():
                store.write(index, {SCORES: rows})

        self._take_up(store, SCORES)
        self._each_missing(scorer, dataset, store, score, f"{self._who()}: scores", row_bytes)
        if out is not None:
            return ArrayTable(out)
        return ShardTable(store, SCORES) if dist.is_main() else None

    def vectors(
        self, scorer: Scorer, dataset: Any, call: Callable[[Ids], Floats], *, width: int, made_from: MadeFrom
    ) -> Vectors:
        """``call(ids)`` float32 [len(ids), about ``width``] for the shards of ``dataset``; a collective.

        They are kept in float32 under ``embeddings``, where there is a folder. made_from: parts of their fingerprint,
        besides the samples; no param of the component, so that others take them up. With ``probe`` there are none.
        """
        ids = np.arange(len(dataset), dtype=np.int64)
        if self.probe is not None:
            self.probe.row_bytes, self.probe.kept = 4 * width, "embeddings (fp32)"
            time_batches(self.probe, scorer, dataset, call)
            return Vectors(len(ids), width, self.shard_samples, [])
        store = self._store(dataset, ids, made_from, EMBEDDINGS)
        made: dict[int, Floats] = {}

        def embed(index: int) -> None:
            rows = call(ids[store.places(index)])
            if dist.is_main() and self.folder is not None:
                store.write(index, {EMBEDDINGS: rows})
                rows = store.read(index, EMBEDDINGS)
            made[index] = rows if index % dist.world_size() == dist.rank() else rows[:0]

        self._take_up(store, EMBEDDINGS)
        for index in dist.broadcast_object(sorted(store.shards)):
            rows = store.read(index, EMBEDDINGS) if dist.is_main() else np.empty(0, np.float32)
            if dist.world_size() > 1:
                sent = dist.broadcast_object(np.array(rows))
                rows = rows if dist.is_main() else sent
            made[index] = rows if index % dist.world_size() == dist.rank() else rows[:0]
        self._each_missing(scorer, dataset, store, embed, f"{self._who()}: embeddings", 4 * width)
        self.features = store.folder if dist.is_main() and self.folder is not None else None
        return Vectors.of_shards(len(ids), store.shard_samples, made)

    def _who(self) -> str:
        return f"step {self.step()}: {self._name()}"

    def _name(self) -> str:
        return self.component.partition(" ")[0] or "the selector"

    def _scored(self, moments: bool, **more: str) -> MadeFrom:
        """What the component's own results are made from."""
        return lambda: {**self.weights(moments), "component": self.component, **more}

    def _store(self, dataset: Any, ids: Ids, made_from: MadeFrom, kind: str) -> ShardStore:
        """The store of this pass, without shards."""
        parent = self._parent(kind)
        if parent is None:
            if kind == FEATURES:
                raise UserError("keep_features: needs output_dir (or features_dir), a folder to keep them in")
            return ShardStore(Path(), {}, ids, self.shard_samples)
        parts = {
            **made_from(),
            "pool": str(getattr(dataset, "fingerprint", "")),
            "samples": ids_part(ids, len(dataset)),
            "dataflex": __version__,
        }
        folder = folder_for(parent, parts, self.shard_samples, say=dist.is_main() and not self._said)
        self._said = True
        return ShardStore(folder, parts, ids, self.shard_samples)

    def _take_up(self, store: ShardStore, kind: str) -> None:
        """Find the shards that are there already, on rank 0."""
        if dist.is_main() and self._parent(kind) is not None:
            store.resume(kind)
            self.taken_up += sum(shard.samples[1] - shard.samples[0] for shard in store.shards.values())

    def _parent(self, kind: str) -> Path | None:
        if kind == FEATURES and self.features_dir is not None:
            return self.features_dir
        return None if self.folder is None else self.folder / kind

    def _each_missing(
        self,
        scorer: Scorer,
        dataset: Any,
        store: ShardStore,
        make: Callable[[int], None],
        what: str,
        row_bytes: int,
    ) -> None:
        """Call ``make`` for every shard that is not there yet, the same ones on every rank.

        Stopped where the run is asked to end, after the shard at hand.
        """
        done = dist.broadcast_object(sorted(store.shards))
        missing = [index for index in range(len(store)) if index not in done]
        lengths = sample_lengths(dataset, store.ids)
        samples = sum(store.places(i).stop - store.places(i).start for i in missing)
        tokens = int(sum(lengths[store.places(i)].sum() for i in missing))
        taken_up = f", {len(done)} of them taken up from {store.folder}" if done else ""
        if store.folder != Path():
            wanted = samples * row_bytes
            dist.together(lambda: check_room(store.folder, wanted, "the pass") if dist.is_main() else None)
        disk = f", {size(len(store.ids) * row_bytes)} on disk" if self.folder is not None else ""
        whole = f"{counted(len(store.ids), 'sample')}, {int(lengths.sum()):,} tokens in {counted(len(store), 'shard')}"
        logger.info(f"{what} of {whole}{taken_up}{disk}")
        stop = self.stop()
        with stop.heeding(), watched(scorer, Progress(what, samples, tokens)), scorer.keep_moments():
            for place, index in enumerate(missing, start=1):
                make(index)
                end_here(stop, store, len(done) + place)


def end_here(stop: Stop, store: ShardStore, done: int) -> None:
    """Between two shards: wait for all ranks; Stopped where one was asked to end and shards are missing."""
    if sum(dist.gather_objects(stop.vote(dist.world_size()))) and done < len(store):
        raise Stopped(
            f"stopped inside a scoring pass ({stop.reason}): {done} of {len(store)} shards are kept in {store.folder}; "
            "the same command goes on with the next one"
        )


@contextmanager
def watched(scorer: Scorer, progress: Progress) -> Iterator[None]:
    """Inside, the scorer's batches move ``progress`` instead of being logged call by call."""
    with progress:
        scorer.watch = progress.batch
        try:
            yield
        finally:
            scorer.watch = None
