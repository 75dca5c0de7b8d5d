"""`Scorer`: what selectors use to look at samples through the current model.

Every method must be called on every rank with the same arguments; results are the same on every rank.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex.ops import SampleLoss, Transform, per_sample_loss, shift_labels
from dataflex.scoring.batches import MOST_SAMPLES, Ids, bucket, deal
from dataflex.scoring.context import scoring_mode
from dataflex.scoring.gather import merge
from dataflex.scoring.sinks import Moments, ProjectingSink
from dataflex.scoring.taps import Taps, find_targets, parameter_names
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

Floats = NDArray[np.float32]
MomentReader = Callable[[Iterable[str]], tuple[Moments, Transform]]
_HALF_SCALE = 1024.0


class SplitBatch(NamedTuple):
    """inputs: the model's keyword arguments; labels: [N] int64, shifted; raw_labels: [B, T] as collated;

    cu_seqlens: [S + 1] int64, one segment per sample over the N = B * T flattened tokens.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    raw_labels: Tensor
    cu_seqlens: Tensor


def split_batch(batch: dict[str, Any], device: torch.device) -> SplitBatch:
    """Move a collated batch to ``device`` and take it apart. Without ``cu_seqlens`` every row is a sample."""
    inputs = {k: v.to(device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}
    labels, cu_seqlens = inputs.pop("labels"), inputs.pop("cu_seqlens", None)
    inputs.pop("sample_weight", None)
    if cu_seqlens is None:
        rows, tokens = labels.shape
        cu_seqlens = torch.arange(rows + 1, device=device) * tokens
    return SplitBatch(inputs, shift_labels(labels), labels, cu_seqlens)


def logits_of(outputs: Any) -> Tensor:
    """The logits [B, T, V] of a Hugging Face output, or the output itself where it is a tensor."""
    logits: Tensor = outputs if torch.is_tensor(outputs) else outputs.logits
    return logits


class Scorer:
    """Scores samples of map-style datasets with ``engine.module`` in batches of ``token_budget`` tokens.

    engine: a DeepSpeed engine, any ZeRO stage. collator: list of samples to a padded batch. moments: reads
    Adam's moments and constants of named parameters (a collective under ZeRO).
    """

    def __init__(
        self,
        engine: Any,
        collator: Callable[[list[Any]], dict[str, Any]],
        token_budget: int,
        moments: MomentReader,
    ) -> None:
        self.engine = engine
        self.collator = collator
        self.token_budget = token_budget
        self._read_moments = moments

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
            out[0, places], out[1, places] = losses.loss.cpu().numpy(), losses.count.cpu().numpy()

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
            for places, batch in self._batches(dataset, ids, "scoring losses", max_samples):
                losses, cu_seqlens = self._forward(batch, reduction)
                if places is not None:
                    consume(places, losses, cu_seqlens)
        self._release()

    def gradient_features(
        self, dataset: Any, ids: Ids | None = None, *, proj_dim: int, seed: int, adam: str | None = None
    ) -> Floats:
        """Features of the samples, float32 [n, proj_dim], all in memory: for targets and small sets."""
        ids = np.arange(len(dataset), dtype=np.int64) if ids is None else ids
        out = np.zeros((len(ids), proj_dim), dtype=np.float32)

        def keep(places: Ids, features: Tensor) -> None:
            out[places] = features.cpu().numpy()

        self.stream_features(dataset, ids, keep, proj_dim=proj_dim, seed=seed, adam=adam)
        return merge(out, self.device)

    def gradient_scores(
        self,
        dataset: Any,
        score: Callable[[Tensor], Tensor],
        ids: Ids | None = None,
        *,
        proj_dim: int,
        seed: int,
        adam: str | None = None,
    ) -> Floats:
        """One number per sample, float32 [n]: ``score`` of its feature ([b, proj_dim] to [b]).

        Features are dropped batch by batch, so memory does not grow with the number of samples.
        """
        ids = np.arange(len(dataset), dtype=np.int64) if ids is None else ids
        out = np.zeros(len(ids), dtype=np.float32)

        def keep(places: Ids, features: Tensor) -> None:
            out[places] = score(features).cpu().numpy()

        self.stream_features(dataset, ids, keep, proj_dim=proj_dim, seed=seed, adam=adam)
        return merge(out, self.device)

    def stream_features(
        self,
        dataset: Any,
        ids: Ids,
        consume: Callable[[Ids, Tensor], None],
        *,
        proj_dim: int,
        seed: int,
        adam: str | None,
    ) -> None:
        """Call ``consume(places, features)`` for each of this rank's batches.

        adam: None for the plain gradient, or a `Transform` kind for the optimizer's view of it.
        places: int64 [b], positions in ``ids``; features: float32 [b, proj_dim] on the device.
        """
        targets = find_targets(self.engine.module)
        names = parameter_names(targets)
        moments, transform = self._moments(names, adam)
        sink = ProjectingSink(
            transform=transform,
            seed=seed,
            proj_dim=proj_dim,
            moments=moments,
            shared=frozenset(name for name, uses in Counter(names).items() if uses > 1),
        )
        with scoring_mode(self.engine.module, gradients=True), Taps(targets, sink) as taps:
            for places, batch in self._batches(dataset, ids, "scoring gradients"):
                self._backward(taps, sink, batch)
                features = sink.finish()
                if places is not None:
                    consume(places, features)
        self._release()

    def _backward(self, taps: Taps, sink: ProjectingSink, batch: dict[str, Any]) -> None:
        inputs, labels, _, cu_seqlens = split_batch(batch, self.device)
        half = next(self.engine.module.parameters()).dtype is torch.float16
        sink.scale = 1.0 / _HALF_SCALE if half else 1.0
        sink.start(cu_seqlens, self.device)
        taps.start()
        logits = logits_of(self.engine.module(**inputs))
        loss = per_sample_loss(logits.flatten(0, 1), labels, cu_seqlens).loss.sum()
        (loss / sink.scale).backward()
        taps.check_fired()

    def _forward(self, batch: dict[str, Any], reduction: str) -> tuple[SampleLoss, Tensor]:
        inputs, labels, _, cu_seqlens = split_batch(batch, self.device)
        logits = logits_of(self.engine.module(**inputs))
        return per_sample_loss(logits.flatten(0, 1), labels, cu_seqlens, reduction=reduction), cu_seqlens

    def _moments(self, names: list[str], adam: str | None) -> tuple[Moments, Transform]:
        if adam is None:
            return {}, Transform("sgd")
        moments, constants = self._read_moments(names)
        return moments, replace(constants, kind=adam)

    def _batches(
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
        seconds = time.monotonic() - started
        logger.info(
            f"{what}: {len(ids):,} samples, {int(lengths.sum()):,} tokens in {seconds:.1f} s "
            f"({lengths.sum() / max(seconds, 1e-9):,.0f} tokens/s, {len(batches)} batches)"
        )

    def _release(self) -> None:
        """Under ZeRO-3 give back the parameters that the pass left gathered."""
        self.engine.empty_partition_cache()


def sample_lengths(dataset: Any, ids: Ids) -> NDArray[np.int64]:
    """Tokens of each sample, int64 [n]: from the dataset's ``lengths``, else by reading it."""
    known = getattr(dataset, "lengths", None)
    if known is not None:
        return np.asarray(known)[ids].astype(np.int64)
    return np.array([len(dataset[int(i)]["input_ids"]) for i in ids], dtype=np.int64)
