"""The training pool: all samples of all domains, concatenated and unshuffled; positions are sample ids."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dataflex.data.encoding.encode import IGNORE_INDEX
from dataflex.data.sources.origin import Origin
from dataflex.data.sources.scan import bounds_of, bounds_of_column, scan_dataset, to_array
from dataflex.utils.errors import UserError

DEFAULT_DOMAIN = "train"


class TrainingPool(ABC):
    """What training asks of its data, whether it is known as a whole (`Pool`) or read as it comes (`StreamPool`).

    Attributes:
        domain_names: the datasets' names.
        fingerprint: changes with the content or the tokenisation; the same in every process.
        sample_weights: float64 [N], finite and not negative, the samples' own weights; or None.
    """

    domain_names: list[str]
    fingerprint: str
    sample_weights: np.ndarray | None = None

    @abstractmethod
    def __getitem__(self, index: int | np.integer[Any]) -> dict[str, Any]:
        """The sample of an id: `input_ids`, `labels` (-100: not trained on; unshifted) and what else it brings."""

    @property
    @abstractmethod
    def size(self) -> int | None:
        """How many samples there are; None where it is not known."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """No sample has more tokens."""

    @property
    @abstractmethod
    def weighs_tokens(self) -> bool:
        """Whether the samples bring weights of their tokens."""

    @abstractmethod
    def domains_of(self, ids: Any) -> np.ndarray:
        """The domain of each sample, int64 [n]. ids: int64 [n]."""

    def whence(self, index: int) -> str:
        """Where a sample is from, for messages: its dataset."""
        return f"'{self.domain_names[int(self.domains_of(np.array([index]))[0])]}'"

    @abstractmethod
    def lengths_of(self, ids: np.ndarray) -> np.ndarray:
        """Tokens of each sample, int64 [n]. ids: int64 [n]; of streams, samples that this rank read for this step."""

    @abstractmethod
    def weight_rows(self, ids: np.ndarray) -> np.ndarray:
        """Where the weights of these samples lie in `StaticWeights.loss`, int64 [n]."""

    @abstractmethod
    def tokens_of(self, batch: Any) -> np.ndarray:
        """Tokens by domain of the global batch that was just trained on, int64 [domains]; may be a collective.

        batch: a `dataflex.engine.steps.batches.StepBatch`.
        """

    @abstractmethod
    def trial_ids(self, count: int) -> np.ndarray:
        """Ids to try steps with, int64 [count]: as mixed as those of training, where the pool can tell."""


class Pool(TrainingPool):
    """A map-style dataset with the domain and the length of every sample.

    Attributes:
        dataset: map-style; items are dicts with `input_ids` and `labels` (-100: not trained on; unshifted)
            and, where asked for, `token_weight`. Kept on disk; nothing here holds the samples in memory.
        domain_ids: int32 [N], indices into domain_names.
        lengths: int32 [N], tokens per sample.
        rows: int64 [N], the row of its dataset that each sample is made from, counted from 0 over the dataset's
            files; None where samples are not made from one row each.
        origins: of each domain, its files; None where it has none, or where the datasets came as objects.
    """

    _id_bounds: tuple[int, int] | None = None

    def __init__(
        self,
        dataset: Any,
        domain_ids: np.ndarray,
        domain_names: list[str],
        lengths: np.ndarray,
        fingerprint: str,
        rows: np.ndarray | None = None,
        sample_weights: np.ndarray | None = None,
        origins: Sequence[Origin | None] | None = None,
    ) -> None:
        assert len(dataset) == len(domain_ids) == len(lengths), "one domain and one length per sample"
        self.dataset = dataset
        self.domain_ids = np.asarray(domain_ids, dtype=np.int32)
        self.domain_names = list(domain_names)
        self.lengths = np.asarray(lengths, dtype=np.int32)
        self.fingerprint = fingerprint
        self.rows = rows
        self.origins = origins
        self.sample_weights = None if sample_weights is None else np.asarray(sample_weights, dtype=np.float64)
        assert self.sample_weights is None or len(self.sample_weights) == len(self), "one weight per sample"

    def __len__(self) -> int:
        return len(self.domain_ids)

    def __getitem__(self, index: int | np.integer[Any]) -> dict[str, Any]:
        sample: dict[str, Any] = self.dataset[int(index)]
        return sample

    @property
    def size(self) -> int:
        return len(self)

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @property
    def weighs_tokens(self) -> bool:
        return len(self) > 0 and "token_weight" in self[0]

    @property
    def id_bounds(self) -> tuple[int, int]:
        """No token id or label but -100 is lower or higher; read once, of an Arrow table as a whole."""
        if self._id_bounds is None:
            table = getattr(self.dataset, "data", None)
            if table is None:
                bounds = [
                    bounds_of(*(to_array(self[i][key]) for key in ("input_ids", "labels"))) for i in range(len(self))
                ]
            else:
                bounds = [bounds_of_column(table.column(key)) for key in ("input_ids", "labels")]
            self._id_bounds = min(low for low, _ in bounds), max(high for _, high in bounds)
        return self._id_bounds

    def whence(self, index: int) -> str:
        """The file:row that it is made from, or its place in a dataset that came as an object, counted from 0."""
        if self.rows is None:
            return super().whence(index)
        origin, row = None, self.rows[index : index + 1]
        if self.origins is not None:
            origin = self.origins[self.domain_ids[index]]
        if origin is None:
            return f"{super().whence(index)} at {row[0]}"
        files, within = origin.places(row)
        return f"{origin.names[files[0]]}:{within[0] + 1}"

    def domains_of(self, ids: Any) -> np.ndarray:
        return self.domain_ids[ids].astype(np.int64)

    def lengths_of(self, ids: np.ndarray) -> np.ndarray:
        return self.lengths[ids].astype(np.int64)

    def weight_rows(self, ids: np.ndarray) -> np.ndarray:
        return ids

    def tokens_of(self, batch: Any) -> np.ndarray:
        ids = batch.sample_ids
        return np.bincount(self.domain_ids[ids], self.lengths[ids], len(self.domain_names)).astype(np.int64)

    def trial_ids(self, count: int) -> np.ndarray:
        return np.random.default_rng(0).permutation(len(self))[np.arange(count) % len(self)]

    def domain_sizes(self) -> np.ndarray:
        """Samples per domain, int64 [domains]."""
        return np.bincount(self.domain_ids, minlength=len(self.domain_names))

    @classmethod
    def from_datasets(cls, datasets: Any, key: str = "train_dataset") -> Pool:
        """A pool over tokenised map-style datasets: one, or {domain name: dataset} for several domains.

        Items must be dicts with `input_ids` and `labels` of the same length (lists, arrays or 1-D tensors), and
        may have a `sample_weight` and a `token_weight` (one number per token), in all of them or in none.
        Every item is read once, for its length and the fingerprint. Raises UserError naming the sample.
        key: what the errors call the datasets.
        """
        if isinstance(datasets, Pool):
            return datasets
        named = dict(datasets) if isinstance(datasets, Mapping) else {DEFAULT_DOMAIN: datasets}
        if not named:
            raise UserError(f"{key}: there is no dataset in the mapping")
        digest = hashlib.sha256()
        lengths: list[np.ndarray] = []
        weights: list[np.ndarray | None] = []
        bounds: list[tuple[int, int]] = []
        for name, dataset in named.items():
            scan = scan_dataset(f"{key} '{name}'" if isinstance(datasets, Mapping) else key, dataset)
            lengths.append(scan[0])
            weights.append(scan[2])
            bounds.append(scan[3])
            digest.update(repr((str(name), len(scan[0]), scan[1])).encode())
        given = [weight for weight in weights if weight is not None]
        if given and len(given) < len(weights):
            without = next(name for name, weight in zip(named, weights, strict=True) if weight is None)
            raise UserError(f"{key} '{without}': has no sample_weight, other datasets have it")
        from torch.utils.data import ConcatDataset

        parts = list(named.values())
        pool = cls(
            dataset=parts[0] if len(parts) == 1 else ConcatDataset(parts),
            domain_ids=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in lengths]),
            domain_names=[str(name) for name in named],
            lengths=np.concatenate(lengths),
            fingerprint=digest.hexdigest()[:32],
            rows=np.concatenate([np.arange(len(part)) for part in lengths]),
            sample_weights=np.concatenate(given) if given else None,
        )
        pool._id_bounds = min(low for low, _ in bounds), max(high for _, high in bounds)
        return pool


def check_ids(sample: Mapping[str, Any], rows: int, named: str) -> None:
    """UserError for a token id or label of ``sample`` that a model of ``rows`` ids does not have. named: the sample."""
    for column in ("input_ids", "labels"):
        ids = np.asarray(sample[column], dtype=np.int64)
        wrong = ids[((ids < 0) & ~((ids == IGNORE_INDEX) & (column == "labels"))) | (ids >= rows)]
        if wrong.size:
            raise UserError(
                f"{named}: {column} has the token id {wrong[0]}, the model's vocabulary has ids 0 to {rows - 1}; the "
                "data must be made with the tokenizer of this model"
            )


def describe_sample(pool: TrainingPool, index: int, tokenizer: Any, max_chars: int = 2000) -> str:
    """One decoded sample for the log: what is trained on stands between ⟦ and ⟧."""
    sample = pool[index]
    ids, labels = to_array(sample["input_ids"]), to_array(sample["labels"])
    text = mark_trained(ids.tolist(), labels.tolist(), tokenizer)
    if len(text) > max_chars:
        half = max_chars // 2
        text = f"{text[:half]} ... {len(text) - 2 * half:,} characters left out ... {text[-half:]}"
    trained = int((labels != IGNORE_INDEX).sum())
    domain = pool.domain_names[int(pool.domains_of([index])[0])]
    return f"sample {index} of {domain}: {len(ids)} tokens, {trained} trained on (between ⟦ and ⟧)\n{text}"


def mark_trained(input_ids: list[int], labels: list[int], tokenizer: Any) -> str:
    """The decoded text with ⟦…⟧ around what is trained on."""
    text, start = [], 0
    for end in range(1, len(input_ids) + 1):
        trained = labels[start] != IGNORE_INDEX
        if end == len(input_ids) or (labels[end] != IGNORE_INDEX) != trained:
            part = tokenizer.decode(input_ids[start:end], skip_special_tokens=False)
            text.append(f"⟦{part}⟧" if trained else part)
            start = end
    return "".join(text)
