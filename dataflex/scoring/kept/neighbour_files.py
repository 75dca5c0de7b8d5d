"""Files of an offline selection by neighbours: ``top_indices.npy`` int64 [M, K] and ``tsds_probs.npy`` float64 [N].

The first has of each of M targets the ids of its K nearest samples, nearest first; the second the probability of each
of N samples, which sum to 1. Other tools write and read them too, so they are checked as they are read. Beside them
``target_embeddings.npy`` float32 [M, d], unit vectors, is written for other tools alone.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.scoring.batches import Ids
from dataflex.utils.errors import UserError

NAMES = TOP_INDICES, PROBABILITIES, TARGET = "top_indices.npy", "tsds_probs.npy", "target_embeddings.npy"
# What probabilities may sum to besides 1: sums of a float32 array's rounded values.
_NEAR_ONE = 1e-4


def write_top_indices(folder: Path, ids: Ids) -> Path:
    """Write int64 [M, K]; the file's path."""
    assert ids.ndim == 2 and ids.dtype == np.int64
    return _write(folder / TOP_INDICES, ids)


def write_probabilities(folder: Path, probabilities: NDArray[np.float64]) -> Path:
    """Write float64 [N]; the file's path."""
    assert probabilities.ndim == 1 and abs(probabilities.sum() - 1) < 1e-9
    return _write(folder / PROBABILITIES, probabilities.astype(np.float64))


def write_target(folder: Path, vectors: NDArray[np.float32]) -> Path:
    """Write float32 [M, d]; the file's path."""
    assert vectors.ndim == 2 and vectors.dtype == np.float32
    return _write(folder / TARGET, vectors)


def read_top_indices(path: Path, pool_size: int) -> Ids:
    """int64 [M, K], each row's ids distinct and below ``pool_size``. UserError, in one line, for another file."""
    found = _read(path, "i", 2, "int [targets, neighbours]")
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= pool_size:
        wrong = low if low < 0 else high
        raise UserError(f"{path}: has the sample id {wrong}; valid: 0 to {pool_size - 1}, the samples of the pool")
    ordered = np.sort(found, axis=1)
    twice = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
    if len(twice):
        raise UserError(f"{path}: row {twice[0]} names a sample twice; valid: a target's neighbours, each once")
    return found.astype(np.int64)


def read_probabilities(path: Path, pool_size: int) -> NDArray[np.float64]:
    """float64 [pool_size], not negative, of sum 1. UserError, in one line, for another file."""
    found = _read(path, "f", 1, "float [samples]").astype(np.float64)
    if len(found) != pool_size:
        raise UserError(f"{path}: has {len(found):,} probabilities; valid: one for each of {pool_size:,} samples")
    wrong = np.flatnonzero(~(np.isfinite(found) & (found >= 0)))
    if len(wrong):
        raise UserError(f"{path}: the probability of sample {wrong[0]} is {found[wrong[0]]}; valid: numbers >= 0")
    total = float(found.sum())
    if abs(total - 1) > _NEAR_ONE:
        raise UserError(f"{path}: the probabilities sum to {total:.6g}; valid: 1")
    return found / total


def _write(path: Path, array: NDArray[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("wb") as handle:
        np.save(handle, array, allow_pickle=False)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path)
    return path


def _read(path: Path, kind: str, dimensions: int, valid: str) -> NDArray[Any]:
    """The array of a file that is not empty. kind: of its dtype, ``i`` or ``f``."""
    try:
        found: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as a .npy file ({type(error).__name__}); valid: {valid}") from None
    kinds = "iu" if kind == "i" else "f"
    if not isinstance(found, np.ndarray) or found.dtype.kind not in kinds or found.ndim != dimensions or not found.size:
        shape = getattr(found, "shape", "several")
        raise UserError(f"{path}: holds {getattr(found, 'dtype', 'arrays')} {shape}; valid: {valid}")
    return found
