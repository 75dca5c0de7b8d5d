"""`dataflex-cli select`: from scores on disk to a chosen dataset, in one process and without a model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.config import Config
from dataflex.config.rules.streaming import needs_known_data
from dataflex.data.chosen import Chosen, Cost, read_chosen, with_chosen_data
from dataflex.data.sources.info import DatasetInfo, find_dataset_dir, read_dataset_infos
from dataflex.data.sources.rows import content_of
from dataflex.driver import index_files, scores
from dataflex.driver.chosen_folder import Picked, write_folder
from dataflex.driver.scores import Places, Scored
from dataflex.report.decision_table import SCORE
from dataflex.scoring.decide.choose import Choice, choose, domain_quotas
from dataflex.scoring.decide.rules import check_rule
from dataflex.scoring.decide.table import ArrayTable
from dataflex.scoring.kept.store import StoreReader
from dataflex.train.decisions.served import of_subtasks, starved
from dataflex.train.selector.base_selector import Served
from dataflex.utils.errors import UserError, listed
from dataflex.utils.logging import logger


@dataclass(frozen=True)
class Made:
    """What was decided, by which rule, and what it took to get there but for choosing."""

    picked: Picked
    held_out: Places | None
    cost: Cost
    aggregate: str


def select(cfg: Config) -> None:
    """Choose as ``cfg.score`` says, and write the rows as datasets with a dataset_info.json of their own."""
    started = time.monotonic()
    needs_known_data(cfg, "select")
    dataset_dir = find_dataset_dir(cfg.data.dataset_dir, cfg.source)
    before, cfg = read_chosen(dataset_dir), with_chosen_data(cfg)
    wanted = cfg.score
    sources = [Path(name).expanduser() for name in wanted.select_from or (cfg.output.output_dir,)]
    by_file = any(source.suffix == index_files.ENDING for source in sources)
    made = (_by_file if by_file else _by_scores)(cfg, sources, dataset_dir)
    picked, names = made.picked, [info.name for info in made.picked.infos]
    shares = np.bincount(picked.places.domains[picked.picks], minlength=len(names)).tolist()
    cost = made.cost if before is None else made.cost.plus(before.cost)
    chosen = Chosen(
        picked=dict(zip(names, shares, strict=True)),
        held_out=[] if before is None else before.held_out,
        aggregate=made.aggregate,
        made_from=[str(source) for source in sources],
        cost=cost.plus(Cost(selection_seconds=time.monotonic() - started)),
    )
    folder = Path(wanted.select_dir or Path(cfg.output.output_dir) / "selected")
    write_folder(folder, cfg, dataset_dir, picked, made.held_out, chosen)
    named = ", ".join(f"{name} {n:,}" for name, n in chosen.picked.items())
    logger.info(f"chose {len(picked.picks):,} of {len(picked.places.rows):,} samples ({named}): {folder}")
    logger.info(chosen.cost.line)


def _by_scores(cfg: Config, folders: list[Path], dataset_dir: Path) -> Made:
    found = [scores.read(folder) for folder in folders]
    first = found[0]
    infos = _infos(cfg, first, dataset_dir)
    rule = _rule(cfg, first)
    total = _summed(cfg.score.select_weights, found)
    picks, column = _picks(cfg, found, total, rule)
    scored: dict[str, NDArray[Any]] = {SCORE: scores.by_rule(total, rule)}
    names = first.facts.subtasks
    if len(names) > 1:
        scored |= {scores.column_of(name): total[:, j] for j, name in enumerate(names)}
        scored["serves"] = np.full(len(total), None, dtype=object)
        tasks, task = names, column
        if first.facts.tasks:
            tasks, task = first.facts.tasks, np.array(first.facts.task_of, dtype=np.int64)[column]
        scored["serves"][picks] = np.array(tasks, dtype=object)[task]
        _say_served(Served(tasks, task, total[picks, column], "try select_aggregate=round_robin"), picks)
    picked = Picked(infos, first.places, picks, scored, replacement=rule == scores.DRAW and first.facts.replacement)
    return Made(picked, scores.read_held_out(first), _cost(found), rule)


def _by_file(cfg: Config, sources: list[Path], dataset_dir: Path) -> Made:
    """By neighbours of targets or probabilities that somebody wrote; beside scores they are of the same samples."""
    path = next(source for source in sources if source.suffix == index_files.ENDING)
    if len(sources) > 1:
        raise UserError(f"{index_files.KEY}: {path} cannot be summed with other scores; give it alone")
    for key in ("select_weights", "select_aggregate", "select_quotas", "select_duplicates"):
        if getattr(cfg.score, key) is not None:
            raise UserError(f"{key}: is of scores, and {path} says itself who is taken; drop it")
    held_out, cost = None, Cost(selection_seconds=0.0)
    if (path.parent / scores.FACTS).exists():
        scored = scores.read(path.parent)
        scores.check_beside(scored, path)
        infos, places = _infos(cfg, scored, dataset_dir), scored.places
        held_out, cost = scores.read_held_out(scored), _cost([scored])
    else:
        infos = read_dataset_infos(cfg.data.dataset, dataset_dir)
        places = index_files.raw_places(infos)
        logger.info(
            f"{path}: no {scores.FACTS} beside it, so its samples are the rows of {', '.join(cfg.data.dataset)}"
        )
    size = len(places.rows)
    found, count = index_files.read_index_file(path, size), _count(cfg, size)
    if found.ndim == 2:
        picks, score, rule = index_files.in_turn(found, count, path), index_files.nearness(found, size), "round_robin"
    else:
        picks, score, rule = index_files.drawn(found, count, cfg.train.seed), found, scores.DRAW
    return Made(Picked(infos, places, picks, {SCORE: score}, replacement=rule == scores.DRAW), held_out, cost, rule)


def _rule(cfg: Config, first: Scored) -> str:
    """The rule that is asked for, else that of the component that scored."""
    asked, facts = cfg.score.select_aggregate, first.facts
    if asked is None:
        return facts.aggregate
    check_rule(asked, "select_aggregate")
    if not facts.subtasks and asked != "max":
        raise UserError(
            f"select_aggregate: {asked} chooses between subtasks, and {first.folder} has one score for each sample "
            f"(of {facts.component}); score with a selector that compares with a target, such as less"
        )
    return asked


def _subtasks(names: list[str], column: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int64]]:
    """Subtasks, and the one that each pick serves, where the columns are samples of the target: SUBTASK[PLACE]."""
    if not all(name.endswith(f"[{place}]") for place, name in enumerate(names)):
        return names, column
    own = [name[: name.rindex("[")] for name in names]
    tasks = list(dict.fromkeys(own))
    return tasks, np.array([tasks.index(name) for name in own], dtype=np.int64)[column]


def _say_served(served: Served, picks: NDArray[np.int64]) -> None:
    """How many picks serve each subtask, and whom few serve."""
    subtasks = of_subtasks(served, picks, np.empty(0, dtype=np.int64))
    counts = [f"{name} {facts['picks']:,}" for name, facts in subtasks.items()]
    logger.info(f"picks that serve each subtask: {listed(counts)}")
    poor = starved(subtasks)
    if poor:
        logger.warning(
            f"select: few picks serve {listed(poor)}: less than a fifth of an equal share, "
            f"{len(picks) / len(subtasks):,.0f}; {served.advice}"
        )


def _picks(cfg: Config, found: list[Scored], total: NDArray[np.float64], rule: str) -> Choice:
    wanted, first = cfg.score, found[0]
    domains, names = first.places.domains, first.facts.domains
    count = _count(cfg, len(total))
    if rule == scores.DRAW:
        for key in ("select_quotas", "select_duplicates"):
            if getattr(wanted, key) is not None:
                raise UserError(
                    f"{key}: {first.folder} has probabilities (of {first.facts.component}), by which samples are "
                    "drawn; drop it, or set select_aggregate: max to take the likeliest"
                )
        picks = index_files.drawn(total[:, 0], count, cfg.train.seed, first.facts.replacement)
        return Choice(picks, np.zeros_like(picks))
    quotas = domain_quotas(wanted.select_quotas, count, names, np.bincount(domains, minlength=len(names)))
    table, order = ArrayTable(total.astype(np.float32)), first.facts.order
    how: dict[str, Any] = {
        "rule": rule,
        "columns": None if order is None else np.array(order, dtype=np.int64),
        "vote_share": first.facts.vote_share,
    }
    if wanted.select_duplicates is None:
        return choose(table, domains, count, quotas, **how)
    store = _features(found[-1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (kind,) = store.arrays  # features, or of a selector by embeddings these
    rows_of = lambda ids: store.rows(kind, ids)  # noqa: E731
    choice = choose(table, domains, count, quotas, rows_of, wanted.select_duplicates, device, **how)
    if len(choice.picks) < count:
        logger.warning(f"select_duplicates: only {len(choice.picks):,} of {count:,} samples are unlike enough")
    return choice


def _cost(found: list[Scored]) -> Cost:
    """Of all scores; a run whose checkpoints scored counts once, up to the last of them."""
    trained: dict[Path, float] = {}
    cost = Cost(selection_seconds=0.0)
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
    """Scores [n, M] of each subtask summed over the folders with their weights: as given, else by learning rate."""
    first = found[0]
    for one in found:
        if one.facts.pool != first.facts.pool or len(one) != len(first):
            raise UserError(
                f"select_from: {one.folder} and {first.folder} have scores of different pools; score one pool"
            )
        if one.facts.subtasks != first.facts.subtasks:
            raise UserError(
                f"select_from: {one.folder} has scores of the subtasks {listed(one.facts.subtasks) or 'none'}, "
                f"{first.folder} of {listed(first.facts.subtasks) or 'none'}; score for one target"
            )
    if weights is not None and len(weights) != len(found):
        raise UserError(f"select_weights: expected one for each folder ({len(found)}), got {len(weights)}")
    if weights is None and len(found) > 1:
        unknown = [str(one.folder) for one in found if one.facts.learning_rate is None]
        if unknown:
            raise UserError(f"select_weights: needed, since the learning rate of {unknown[0]} is not known")
        weights = tuple(one.facts.learning_rate or 0.0 for one in found)
        logger.info("weights, by learning rate: " + ", ".join(f"{w:.3g}" for w in weights))
    total = np.zeros_like(first.table)
    for one, weight in zip(found, weights or (1.0,), strict=True):
        total += weight * one.table
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
