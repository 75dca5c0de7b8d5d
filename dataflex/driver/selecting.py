"""`dataflex-cli select`: from scores on disk to a chosen dataset, in one process and without a model."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.config import Config
from dataflex.config.rules.streaming import needs_known_data
from dataflex.data.chosen import Chosen, Cost, read_chosen, with_chosen_data
from dataflex.data.sources.info import DatasetInfo, find_dataset_dir, read_dataset_infos
from dataflex.data.sources.rows import content_of
from dataflex.driver import scores
from dataflex.driver.chosen_folder import Picked, write_folder
from dataflex.driver.scores import Scored
from dataflex.report.decision_table import SCORE
from dataflex.scoring.decide.choose import choose, domain_quotas
from dataflex.scoring.decide.topk import FEATURES
from dataflex.scoring.kept.store import StoreReader
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger


def select(cfg: Config) -> None:
    """Choose as ``cfg.score`` says, and write the rows as datasets with a dataset_info.json of their own."""
    started = time.monotonic()
    needs_known_data(cfg, "select")
    dataset_dir = find_dataset_dir(cfg.data.dataset_dir, cfg.source)
    before, cfg = read_chosen(dataset_dir), with_chosen_data(cfg)
    wanted = cfg.score
    folders = [Path(name).expanduser() for name in wanted.select_from or (cfg.output.output_dir,)]
    found = [scores.read(folder) for folder in folders]
    first = found[0]
    infos = _infos(cfg, first, dataset_dir)
    total = _summed(wanted.select_weights, found)
    picks = _picks(cfg, found, total)
    names = first.facts.domains
    shares = np.bincount(first.places.domains[picks], minlength=len(names)).tolist()
    cost = _cost(found, time.monotonic() - started)
    chosen = Chosen(
        picked=dict(zip(names, shares, strict=True)),
        held_out=[] if before is None else before.held_out,
        made_from=[str(folder) for folder in folders],
        cost=cost if before is None else cost.plus(before.cost),
    )
    folder = Path(wanted.select_dir or Path(cfg.output.output_dir) / "selected")
    picked = Picked(infos, first.places, picks, {SCORE: total})
    write_folder(folder, cfg, dataset_dir, picked, scores.read_held_out(first), chosen)
    named = ", ".join(f"{name} {n:,}" for name, n in chosen.picked.items())
    logger.info(f"chose {len(picks):,} of {len(total):,} samples ({named}): {folder}")
    logger.info(chosen.cost.line)


def _picks(cfg: Config, found: list[Scored], total: NDArray[np.float64]) -> NDArray[np.int64]:
    wanted, first = cfg.score, found[0]
    domains, names = first.places.domains, first.facts.domains
    count = _count(cfg, len(total))
    quotas = domain_quotas(wanted.select_quotas, count, names, np.bincount(domains, minlength=len(names)))
    if wanted.select_duplicates is None:
        return choose(total, domains, count, quotas)
    store = _features(found[-1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows_of = lambda ids: store.rows(FEATURES, ids)  # noqa: E731
    picks = choose(total, domains, count, quotas, rows_of, wanted.select_duplicates, device)
    if len(picks) < count:
        logger.warning(f"select_duplicates: only {len(picks):,} of {count:,} samples are unlike enough")
    return picks


def _cost(found: list[Scored], own_s: float) -> Cost:
    """Of all scores and of choosing; a run whose checkpoints scored counts once, up to the last of them."""
    trained: dict[Path, float] = {}
    cost = Cost(selection_seconds=round(own_s, 3))
    for one in found:
        part, checkpoint = one.facts.cost, one.facts.checkpoint
        if checkpoint is not None:
            run = Path(checkpoint).parent
            trained[run] = max(trained.get(run, 0.0), part.warmup_seconds)
        scoring_s = max(0.0, part.selection_seconds - part.warmup_seconds)
        cost = cost.plus(part.model_copy(update={"selection_seconds": scoring_s, "warmup_seconds": 0.0}))
    warmup_s = sum(trained.values())
    return cost.plus(Cost(selection_seconds=warmup_s, warmup_seconds=warmup_s))


def _infos(cfg: Config, scored: Scored, dataset_dir: Path) -> list[DatasetInfo]:
    """The scored datasets' entries. UserError where they are not the config's, or their data has changed."""
    facts, folder = scored.facts, scored.folder
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


def _summed(weights: tuple[float, ...] | None, found: list[Scored]) -> NDArray[np.float64]:
    """Scores [n] summed over the folders with their weights: as given, else each checkpoint's learning rate."""
    first = found[0]
    for one in found:
        if one.facts.pool != first.facts.pool or len(one) != len(first):
            raise UserError(
                f"select_from: {one.folder} and {first.folder} have scores of different pools; score one pool"
            )
    if weights is not None and len(weights) != len(found):
        raise UserError(f"select_weights: expected one for each folder ({len(found)}), got {len(weights)}")
    if weights is None and len(found) > 1:
        unknown = [str(one.folder) for one in found if one.facts.learning_rate is None]
        if unknown:
            raise UserError(f"select_weights: needed, since the learning rate of {unknown[0]} is not known")
        weights = tuple(one.facts.learning_rate or 0.0 for one in found)
        logger.info("weights, by learning rate: " + ", ".join(f"{w:.3g}" for w in weights))
    total = np.zeros(len(first), dtype=np.float64)
    for one, weight in zip(found, weights or (1.0,), strict=True):
        total += weight * one.score
    return total


def _count(cfg: Config, there: int) -> int:
    fraction, count = cfg.score.select_fraction, cfg.score.select_count
    if (fraction is None) == (count is None):
        raise UserError("select_count: give either select_count or select_fraction, to say how many samples to choose")
    wanted = count if count is not None else max(1, round(there * (fraction or 0.0)))
    if wanted > there:
        raise UserError(f"select_count: {wanted:,} samples are asked for, {there:,} are scored")
    return wanted


def _features(scored: Scored) -> StoreReader:
    if scored.facts.features is None:
        raise UserError(
            f"select_duplicates: {scored.folder} was scored without features; score with keep_features: true"
        )
    return StoreReader(Path(scored.facts.features))
