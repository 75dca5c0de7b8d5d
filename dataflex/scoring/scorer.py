"""`Scorer`: what selectors use to look at samples through the current model.

Every method must be called on every rank with the same arguments; results are the same on every rank.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex.forward.counted import Counted
from dataflex.forward.losses import Forward
from dataflex.forward.split import split_batch
from dataflex.ops import SampleLoss, Sums, Transform
from dataflex.ops.known import moved
from dataflex.scoring.batches import MOST_SAMPLES, Ids, bucket, deal, sample_lengths
from dataflex.scoring.context import release_gathered, scoring_mode
from dataflex.scoring.gather import merge
from dataflex.scoring.gradients.coverage import Target, find_targets, parameter_names, trained_names
from dataflex.scoring.gradients.direction_sink import DirectionSink
from dataflex.scoring.gradients.layer_state import LayerState
from dataflex.scoring.gradients.layers import LayerRule
from dataflex.scoring.gradients.sinks import Moments, ProjectingSink
from dataflex.scoring.gradients.taps import Taps
from dataflex.scoring.progress import counted
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

Floats = NDArray[np.float32]
MomentReader = Callable[[Iterable[str]], tuple[Moments, Transform]]
_HALF_SCALE = 1024.0


class Scorer:
    """Scores samples of map-style datasets with ``engine.module`` in batches of ``token_budget`` tokens.

    engine: a DeepSpeed engine, any ZeRO stage. collator: list of samples to a padded batch. moments: gives
    Adam's moments of named parameters, each read when it is looked up (a collective under ZeRO), and the constants.
    forward: makes the losses, of logits where it is not given. watch: called with the samples and
    tokens of each of this rank's batches, where it is set; else each pass is logged. tally: called with the samples and
    tokens of each pass, those of all ranks.
    """

    def __init__(
        self,
        engine: Any,
        collator: Callable[[list[Any]], dict[str, Any]],
        token_budget: int,
        moments: MomentReader,
        forward: Forward | None = None,
    ) -> None:
        self.engine = engine
        self.collator = collator
        self.token_budget = token_budget
        self._read_moments = moments
        self.forward = forward or Forward()
        self._kept: dict[tuple[str, ...], tuple[Moments, Transform]] | None = None
        self.watch: Callable[[int, int], None] | None = None
        self.tally: Callable[..., None] = lambda samples, tokens=0: None

    @property
    def device(self) -> torch.device:
        return torch.device(self.engine.device)

    def losses(
        self, dataset: Any, ids: Ids | None = None, *, reduction: str = "mean", max_samples: int = MOST_SAMPLES
    ) -> tuple[Floats, Floats]:
        """Loss and number of counted tokens of each sample: two float32 [n], in the order of ``ids``.

        max_samples: of one forward; the token budget holds as well.
        """
        ids = np.arange(len(dataset), dtype=np.int64) if ids is None else ids
        out = np.zeros((2, len(ids)), dtype=np.float32)

        def keep(places: Ids, losses: SampleLoss, _cu_seqlens: Tensor) -> None:
            out[:, places] = torch.stack([losses.loss, losses.count.to(losses.loss)]).cpu().numpy()

        self.stream_losses(dataset, ids, keep, reduction=reduction, max_samples=max_samples)
        merged = merge(out, self.device)
        return merged[0], merged[1]

    def stream_losses(
        self,
        dataset: Any,
        ids: Ids,
        consume: Callable[[Ids, SampleLoss, Tensor], None],
        *,
        reduction: str = "mean",
        max_samples: int = MOST_SAMPLES,
    ) -> None:
        """Call ``consume(places, losses, cu_seqlens)`` for each of this rank's batches.

        places: int64 [b], positions in ``ids``; sample s of the batch is tokens cu_seqlens[s] to cu_seqlens[s + 1]
        of ``losses.token_loss``, its padding last.
        """
        with scoring_mode(self.engine.module, gradients=False):
            for places, batch in self.batches(dataset, ids, "scoring losses", max_samples):
                losses, cu_seqlens = self._forward(batch, reduction)
                if places is not None:
                    consume(places, losses, cu_seqlens)
        self.release()

    def gradient_features(self, dataset: Any, ids: Ids | None = None, **how: Any) -> Floats:
        """Features of the samples, float32 [n, proj_dim], all in memory: for targets and small sets.

        how: as `stream_features` takes it.
        """
        ids = np.arange(len(dataset), dtype=np.int64) if ids is None else ids
        out = np.zeros((len(ids), how["proj_dim"]), dtype=np.float32)

        def keep(places: Ids, features: Tensor) -> None:
            out[places] = features.cpu().numpy()

        self.stream_features(dataset, ids, keep, **how)
        return merge(out, self.device)

    def gradient_scores(
        self, dataset: Any, score: Callable[[Tensor], Tensor], columns: int, ids: Ids | None = None, **how: Any
    ) -> Floats:
        """Numbers of each sample, float32 [n, columns]: ``score`` of its feature ([b, proj_dim] to [b, columns]).

        Features are dropped batch by batch, so memory does not grow with their size.
        how: as `stream_features` takes it.
        """
        ids = np.arange(len(dataset), dtype=np.int64) if ids is None else ids
        out = np.zeros((len(ids), columns), dtype=np.float32)

        def keep(places: Ids, features: Tensor) -> None:
            out[places] = score(features).cpu().numpy()

        self.stream_features(dataset, ids, keep, **how)
        return merge(out, self.device)

    def stream_features(
        self,
        dataset: Any,
        ids: Ids,
        consume: Callable[[Ids, Tensor], None],
        *,
        proj_dim: int,
        seed: int,
        adam: str | None = None,
        projection: str = "xorfold",
        layers: LayerRule | None = None,
    ) -> None:
        """Call ``consume(places, features)`` for each of this rank's batches.

        adam: None for the plain gradient, or a `Transform` kind for the optimizer's view of it. projection: one of
        `dataflex.ops.projection.project_kinds.PROJECTIONS`. layers: which parameters, all by default.
        places: int64 [b], positions in ``ids``; features: float32 [b, proj_dim] on the device.
        """
        targets = find_targets(self.engine.module, layers)
        sink = self.sink(targets, adam=adam, layers=layers, proj_dim=proj_dim, seed=seed, projection=projection)

        def keep(places: Ids, totals: Sums) -> None:
            assert totals.out is not None
            consume(places, totals.out)

        self.run_backward(dataset, ids, targets, sink, keep, "scoring gradients")

    def sink(
        self, targets: list[Target], *, adam: str | None, layers: LayerRule | None, proj_dim: int, **how: Any
    ) -> ProjectingSink:
        """A sink for ``targets`` that reads Adam's moments layer by layer. how: further fields of it."""
        names = parameter_names(targets)
        moments, transform = self.moments(names, adam)
        return ProjectingSink(
            transform=transform,
            proj_dim=proj_dim,
            moments=moments,
            shared=frozenset(name for name, uses in Counter(names).items() if uses > 1),
            factors={} if layers is None else layers.factors(trained_names(self.engine.module)),
            **how,
        )

    def run_backward(
        self,
        dataset: Any,
        ids: Ids,
        targets: list[Target],
        sink: ProjectingSink | DirectionSink,
        consume: Callable[[Ids, Any], None],
        what: str,
        weights: Floats | None = None,
    ) -> None:
        """Forward and activation backward over ``ids``; ``consume(places, sink.finish())`` after each batch.

        weights: factors of the samples' losses, float32 [len(ids)]; 1 without. A batch that a short rank repeats is
        not consumed, and its weights are 0.
        """
        with scoring_mode(self.engine.module, gradients=True), Taps(targets, sink) as taps:
            for places, batch in self.batches(dataset, ids, what):
                scale = None
                if weights is not None:
                    mine = torch.from_numpy(weights[places]) if places is not None else torch.zeros(1)
                    scale = moved(mine, self.device)
                self._backward(taps, sink, batch, scale)
                result = sink.finish()
                if places is not None:
                    consume(places, result)
        self.release()

    def _backward(
        self, taps: Taps, sink: ProjectingSink | DirectionSink, batch: dict[str, Any], weights: Tensor | None
    ) -> None:
        inputs, labels, raw_labels, cu_seqlens = split_batch(batch, self.device)
        half = next(self.engine.module.parameters()).dtype is torch.float16
        sink.scale = 1.0 / _HALF_SCALE if half else 1.0
        sink.start(cu_seqlens)
        taps.start(len(raw_labels), raw_labels.numel(), cu_seqlens)
        losses = self.forward(self.engine.module, inputs, Counted(labels, cu_seqlens), watch=taps.head).losses.loss
        loss = losses.sum() if weights is None else (losses * weights.to(losses)).sum()
        (loss / sink.scale).backward()
        taps.check_fired()

    @contextmanager
    def keep_moments(self) -> Iterator[None]:
        """Inside, what is kept of Adam's moments serves all passes with the same adam and parameters: for short ones.

        No optimizer step may happen inside.
        """
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def _forward(self, batch: dict[str, Any], reduction: str) -> tuple[SampleLoss, Tensor]:
        inputs, labels, _, cu_seqlens = split_batch(batch, self.device)
        return self.forward(self.engine.module, inputs, Counted(labels, cu_seqlens, reduction)).losses, cu_seqlens

    def moments(self, names: list[str], adam: str | None) -> tuple[Moments, Transform]:
        """({name: (exp_avg, exp_avg_sq)}, transform); no moments for the plain gradient.

        To look up a name is a collective under ZeRO: see `LayerState`.
        """
        if adam is None:
            return {}, Transform("sgd")
        key = tuple(names)
        if self._kept is None or key not in self._kept:
            moments, constants = self._read_moments(names)
            found = LayerState(moments), constants
            if self._kept is None:
                return found[0], replace(constants, kind=adam)
            self._kept[key] = found
        state, constants = self._kept[key]
        return state, replace(constants, kind=adam)

    def batches(
        self, dataset: Any, ids: Ids, what: str, max_samples: int = MOST_SAMPLES
    ) -> Iterable[tuple[Ids | None, dict[str, Any]]]:
        """Collated batches of this rank with their places in ``ids``; None where the result is dropped."""
        if len(ids) == 0:
            raise UserError(f"{what}: no samples to score")
        lengths = sample_lengths(dataset, ids)
        batches = bucket(np.arange(len(ids), dtype=np.int64), lengths, self.token_budget, max_samples)
        started = time.monotonic()
        for places, counts in deal(batches, dist.rank(), dist.world_size()):
            batch = self.collator([dataset[int(i)] for i in ids[places]])
            yield (places if counts else None), batch
            if self.watch is not None and counts:
                self.watch(len(places), int(lengths[places].sum()))
        self.tally(len(ids), int(lengths.sum()))
        if self.watch is not None:
            return
        seconds = time.monotonic() - started
        logger.info(
            f"{what}: {counted(len(ids), 'sample')}, {int(lengths.sum()):,} tokens in {seconds:.1f} s "
            f"({lengths.sum() / max(seconds, 1e-9):,.0f} tokens/s, {counted(len(batches), 'batch', 'es')})"
        )

    def release(self) -> None:
        """End a pass: see `release_gathered`."""
        release_gathered(self.engine)
