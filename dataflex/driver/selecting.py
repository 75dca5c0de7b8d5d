"""`dataflex-cli select`: from scores on disk to a chosen dataset, in one process and without a model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.config import Config
from dataflex.config.rules.streaming import needs_known_data
from dataflex.data.sources.info import INFO_FILE, DatasetInfo, find_dataset_dir, read_dataset_infos
from dataflex.data.sources.rows import content_of, entry_for, raw_rows
from dataflex.driver import scores
from dataflex.scoring.decide.choose import choose, domain_quotas
from dataflex.scoring.decide.topk import FEATURES
from dataflex.scoring.kept.store import StoreReader
from dataflex.utils.errors import UserError
from dataflex.utils.files import write_atomically
from dataflex.utils.logging import logger


def select(cfg: Config) -> None:
    """Choose as ``cfg.score`` says, and write the rows as datasets with a dataset_info.json of their own."""
    needs_known_data(cfg, "select")
    wanted = cfg.score
    folders = [Path(name).expanduser() for name in wanted.select_from or (cfg.output.output_dir,)]
    facts, tables = zip(*map(scores.read, folders), strict=True)
    first = facts[0]
    dataset_dir = find_dataset_dir(cfg.data.dataset_dir, cfg.source)
    infos = _infos(cfg, first, dataset_dir, folders[0])
    total = _summed(wanted.select_weights, folders, facts, tables)
    domains = np.array(tables[0]["domain"])
    count = _count(cfg, len(total))
    quotas = domain_quotas(
        wanted.select_quotas, count, first.domains, np.bincount(domains, minlength=len(first.domains))
    )
    if wanted.select_duplicates is None:
        picks = choose(total, domains, count, quotas)
    else:
        store = _features(facts[-1], folders[-1])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        picks = choose(
            total, domains, count, quotas, lambda ids: store.rows(FEATURES, ids), wanted.select_duplicates, device
        )
        if len(picks) < count:
            logger.warning(f"select_duplicates: only {len(picks):,} of {count:,} samples are unlike enough")
    folder = Path(wanted.select_dir or Path(cfg.output.output_dir) / "selected")
    _write(folder, infos, dataset_dir, picks, tables[0], total)
    shares = np.bincount(domains[picks], minlength=len(first.domains))
    named = ", ".join(f"{name} {n:,}" for name, n in zip(first.domains, shares, strict=True))
    logger.info(f"chose {len(picks):,} of {len(total):,} samples ({named}): {folder}")


def _infos(cfg: Config, facts: scores.Facts, dataset_dir: Path, folder: Path) -> list[DatasetInfo]:
    """The scored datasets' entries. UserError where they are not the config's, or their data has changed."""
    if list(cfg.data.dataset) != facts.domains:
        raise UserError(
            f"dataset: {', '.join(cfg.data.dataset)}, but {folder} has scores of {', '.join(facts.domains)}; "
            "select with the datasets that were scored"
        )
    infos = read_dataset_infos(facts.domains, dataset_dir)
    for info, content in zip(infos, facts.contents, strict=True):
        if content_of(info) != content:
            raise UserError(f"{info.where}: the data has changed since {folder} was scored; score again")
    return infos


def _summed(
    weights: tuple[float, ...] | None, folders: list[Path], facts: Iterable[scores.Facts], tables: Iterable[Any]
) -> NDArray[np.float64]:
    """Scores [n] summed over the folders with their weights: as given, else each checkpoint's learning rate."""
    facts, tables = list(facts), list(tables)
    for folder, one, table in zip(folders, facts, tables, strict=True):
        if one.pool != facts[0].pool or len(table) != len(tables[0]):
            raise UserError(f"select_from: {folder} and {folders[0]} have scores of different pools; score one pool")
    if weights is not None and len(weights) != len(folders):
        raise UserError(f"select_weights: expected one for each folder ({len(folders)}), got {len(weights)}")
    if weights is None and len(folders) > 1:
        unknown = [str(folder) for folder, one in zip(folders, facts, strict=True) if one.learning_rate is None]
        if unknown:
            raise UserError(f"select_weights: needed, since the learning rate of {unknown[0]} is not known")
        weights = tuple(one.learning_rate or 0.0 for one in facts)
        logger.info("weights, by learning rate: " + ", ".join(f"{w:.3g}" for w in weights))
    total = np.zeros(len(tables[0]), dtype=np.float64)
    for table, weight in zip(tables, weights or (1.0,), strict=True):
        total += weight * table["score"].astype(np.float64)
    return total


def _count(cfg: Config, there: int) -> int:
    fraction, count = cfg.score.select_fraction, cfg.score.select_count
    if (fraction is None) == (count is None):
        raise UserError("select_count: give either select_count or select_fraction, to say how many samples to choose")
    wanted = count if count is not None else max(1, round(there * (fraction or 0.0)))
    if wanted > there:
        raise UserError(f"select_count: {wanted:,} samples are asked for, {there:,} are scored")
    return wanted


def _features(facts: scores.Facts, folder: Path) -> StoreReader:
    if facts.features is None:
        raise UserError(f"select_duplicates: {folder} was scored without features; score with keep_features: true")
    return StoreReader(Path(facts.features))


def _write(
    folder: Path,
    infos: list[DatasetInfo],
    dataset_dir: Path,
    picks: NDArray[np.int64],
    table: Any,
    total: NDArray[np.float64],
) -> None:
    """One .jsonl for each dataset that anything was chosen of: the raw rows, best first, with id and score."""
    if (table["row"] < 0).any():
        raise UserError("select: packed blocks are not made from one row each; score with packing: false")
    if (folder / INFO_FILE).exists() and folder.resolve() == dataset_dir.resolve():
        raise UserError(f"select_dir: {folder} is dataset_dir, whose data it would write over")
    entries: dict[str, Any] = {}
    for domain, info in enumerate(infos):
        mine = picks[table["domain"][picks] == domain]
        if not len(mine):
            continue
        file_name = f"{info.name.replace(os.sep, '_')}.jsonl"
        rows = raw_rows(info, table["row"][mine])
        lines = []
        for place in mine.tolist():
            row = {**rows[int(table["row"][place])], "dataflex_id": place, "dataflex_score": float(total[place])}
            lines.append(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        write_atomically(folder / file_name, "".join(lines))
        entries[info.name] = entry_for(info, dataset_dir, file_name)
    write_atomically(folder / INFO_FILE, json.dumps(entries, indent=1, ensure_ascii=False))
