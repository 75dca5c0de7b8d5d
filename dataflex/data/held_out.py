"""Parts of a pool: samples held out for evaluation, and the rest."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.data.pool import Pool
from dataflex.data.sources.info import read_dataset_infos
from dataflex.data.sources.rows import raw_rows
from dataflex.data.sources.source import fingerprint_of
from dataflex.utils.errors import UserError, listed, nearest


def held_out(pool: Pool, val_size: float, seed: int) -> np.ndarray:
    """Sample ids for evaluation: ``val_size`` (<= 1: a share, rounded up, else a count), each domain in proportion."""
    total = math.ceil(val_size * len(pool)) if val_size <= 1 else int(val_size)
    if not 0 < total < len(pool):
        raise UserError(
            f"val_size: {val_size:g} holds {total} of {len(pool)} samples out; both sides need at least one"
        )
    exact = pool.domain_sizes() * (total / len(pool))
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - counts.sum()]] += 1
    emptied = np.flatnonzero(counts == pool.domain_sizes())
    if len(emptied):
        raise UserError(f"val_size: {val_size:g} leaves no sample of '{pool.domain_names[emptied[0]]}' to train on")
    rng = np.random.default_rng([seed, 0x76616C])
    picks = [rng.permutation(np.flatnonzero(pool.domain_ids == domain))[:count] for domain, count in enumerate(counts)]
    return np.sort(np.concatenate(picks))


def check_subtasks(pool: Pool, column: str, dataset_dir: Path) -> None:
    """UserError where a sample that was held out has no value in ``column``, in which those are ''."""
    for at, value in enumerate(pool.dataset[column]):
        if not value:
            place = pool.whence(at)
            row = _raw_row(pool, at, dataset_dir)
            raise UserError(
                f"{place}: no '{column}' (subtask_column){nearest(column, row)}, and val_size holds this row out to "
                f"evaluate on; it has {listed(row)}; give all rows of its dataset one, or set eval_dataset instead"
            )


def _raw_row(pool: Pool, at: int, dataset_dir: Path) -> dict[str, Any]:
    """The row that a sample is made from, as it was written."""
    assert pool.rows is not None, "packed blocks keep no column"
    info = read_dataset_infos([pool.domain_names[pool.domain_ids[at]]], dataset_dir)[0]
    number = pool.rows[at : at + 1]
    return raw_rows(info, number)[int(number[0])]


def part_of(pool: Pool, ids: np.ndarray, tag: list[Any]) -> Pool:
    """The samples ``ids`` with the domains that they are from."""
    domains, domain_ids = np.unique(pool.domain_ids[ids], return_inverse=True)
    return Pool(
        dataset=pool.dataset.select(ids),
        domain_ids=domain_ids,
        domain_names=[pool.domain_names[d] for d in domains],
        lengths=pool.lengths[ids],
        fingerprint=fingerprint_of("part", pool.fingerprint, tag),
        rows=None if pool.rows is None else pool.rows[ids],
        sample_weights=None if pool.sample_weights is None else pool.sample_weights[ids],
        origins=None if pool.origins is None else [pool.origins[d] for d in domains],
    )
