"""One reading of a tokenised dataset: its lengths, a hash of its content, its weights, and the bounds of its ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dataflex.data.encoding.encode import IGNORE_INDEX
from dataflex.utils.errors import UserError, shown
from dataflex.utils.logging import logger

WEIGHTS = ("sample_weight", "token_weight")


def to_array(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)


def bounds_of_column(column: Any) -> tuple[int, int]:
    """The lowest and highest number but -100 in an Arrow column of lists."""
    import pyarrow.compute as pc

    low, high = 0, 0
    for chunk in column.chunks:
        ids = chunk.flatten()
        found = pc.min_max(ids.filter(pc.not_equal(ids, IGNORE_INDEX))).as_py()
        low, high = min(low, found["min"] or 0), max(high, found["max"] or 0)
    return low, high


def bounds_of(*columns: np.ndarray) -> tuple[int, int]:
    """The same of arrays."""
    ids = np.concatenate(columns)
    ids = ids[ids != IGNORE_INDEX]
    return int(ids.min(initial=0)), int(ids.max(initial=0))


def scan_dataset(where: str, dataset: Any) -> tuple[np.ndarray, str, np.ndarray | None, tuple[int, int]]:
    """Lengths (int32 [N]), a content hash that does not depend on how the dataset is stored, sample weights, bounds.

    where: what the errors call the dataset.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(f"{where}: a {type(dataset).__name__} has no length; sample ids need a map-style dataset")
    if len(dataset) == 0:
        raise UserError(f"{where}: is empty")
    hashes = {key: hashlib.sha256() for key in ("input_ids", "labels", *WEIGHTS)}
    lengths = np.zeros(len(dataset), dtype=np.int32)
    weights: list[float] = []
    untrained = 0
    low, high = 0, 0
    for index, ids, labels, weight, token_weight in _items(dataset, where):
        if len(ids) != len(labels):
            raise UserError(f"{where}: sample {index} has {len(ids)} input_ids but {len(labels)} labels")
        if weight is not None:
            own = check_weights([weight], 1, f"{where}: sample {index}: sample_weight")
            weights += own.tolist()
            hashes["sample_weight"].update(own.tobytes())
        if token_weight is not None:
            own = check_weights(token_weight, len(ids), f"{where}: sample {index}: token_weight")
            hashes["token_weight"].update(own.tobytes())
        if weights and len(weights) != index + 1:
            has = "no sample_weight, others have it" if weight is None else "a sample_weight, others have none"
            raise UserError(f"{where}: sample {index} has {has}")
        lengths[index] = len(ids)
        bounds = bounds_of(ids, labels)
        low, high = min(low, bounds[0]), max(high, bounds[1])
        untrained += not (labels[1:] != IGNORE_INDEX).any()
        hashes["input_ids"].update(ids.tobytes())
        hashes["labels"].update(labels.tobytes())
    if untrained == len(dataset):
        raise UserError(f"{where}: all {untrained} samples are masked: no label counts in the loss")
    if untrained:
        logger.warning(f"{where}: {untrained} of {len(dataset)} samples have no label that counts in the loss")
    sizes = hashlib.sha256(lengths.tobytes()).hexdigest()
    content = ":".join([sizes, *(h.hexdigest() for h in hashes.values())])
    return lengths, content, np.array(weights) if weights else None, (low, high)


def check_weights(values: Any, count: int, what: str) -> np.ndarray:
    """``values`` as float64 [count]; UserError unless they are ``count`` finite numbers >= 0."""
    try:
        weights = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{what}: expected {count} numbers >= 0, got {shown(values)}") from None
    if weights.shape != (count,):
        raise UserError(f"{what}: expected {count} numbers, got shape {weights.shape}")
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if bad.size:
        at = f" at {bad[0]}" if count > 1 else ""
        raise UserError(f"{what}: expected numbers >= 0, got {weights[bad[0]]:g}{at}")
    return weights


def _items(dataset: Any, where: str) -> Iterator[tuple[int, np.ndarray, np.ndarray, Any, Any]]:
    """(index, input_ids, labels, sample_weight, token_weight), ids as int64 arrays, weights None where there are none.

    In large batches where the dataset is an Arrow one.
    """
    columns = getattr(dataset, "column_names", None)
    if hasattr(dataset, "with_format") and isinstance(columns, list):
        _check_keys(columns, where)
        also = [key for key in WEIGHTS if key in columns]
        plain = dataset.with_format(None).select_columns(["input_ids", "labels", *also])
        at, nothing = 0, [None] * 1000
        for batch in plain.iter(batch_size=1000):
            own = [batch.get(key, nothing[: len(batch["labels"])]) for key in WEIGHTS]
            for ids, labels, weight, token_weight in zip(batch["input_ids"], batch["labels"], *own, strict=True):
                yield at, to_array(ids), to_array(labels), weight, token_weight
                at += 1
        return
    for index in range(len(dataset)):
        item = dataset[index]
        if not isinstance(item, Mapping):
            raise UserError(f"{where}: sample {index} is a {type(item).__name__}, not a dict")
        _check_keys(list(item), f"{where}: sample {index}")
        ids, labels = to_array(item["input_ids"]), to_array(item["labels"])
        yield index, ids, labels, item.get("sample_weight"), item.get("token_weight")


def _check_keys(keys: list[str], where: str) -> None:
    missing = [key for key in ("input_ids", "labels") if key not in keys]
    if missing:
        raise UserError(f"{where}: has no {' and no '.join(missing)}; it has {', '.join(map(str, keys))}")
