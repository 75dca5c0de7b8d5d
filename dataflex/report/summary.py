"""The first and the last screen of a run: its arithmetic; what was decided, the losses, where to look next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, with_config
from typing_extensions import NotRequired, TypedDict

from dataflex.core.context import Run
from dataflex.core.packing import Packing
from dataflex.core.run_files import RESULTS, RunFile, written
from dataflex.data.pool import Pool, TrainingPool
from dataflex.utils.errors import UserError
from dataflex.utils.records import DamagedError, read_record

MOST_LINES = 4
MOST_SUBTASKS = 20
MOST_LOSSES = 6


def opening_lines(run: Run, deciders: str, zero_stage: int) -> list[str]:
    """The batch arithmetic of a run that starts; ``deciders``: who decides what, in words."""
    sizes = [str(phase.steps) for phase in run.schedule.phases]
    shown = ", ".join(sizes if len(sizes) <= 5 else [*sizes[:3], "...", sizes[-1]])
    packs = [] if run.packing is None else [f"  Num packs = {packs_line(run.packing)}"]
    rows = "" if run.packing is None else " packs"
    pool_rows = run.pool.size if run.packing is None else run.packing.pool.rows
    drawn = run.total_steps * run.global_batch
    passes = "" if pool_rows is None else f" ({drawn / pool_rows:.2f} x {pool_rows:,})"
    return [
        "***** Running training *****",
        f"  Num examples = {'not known (streamed)' if run.pool.size is None else f'{run.pool.size:,}'}",
        *packs,
        f"  Batch size per device = {run.micro_batch}{rows}",
        f"  Gradient accumulation steps = {run.accumulation}",
        f"  Total train batch size (x {run.world_size} processes) = {run.global_batch}{rows}",
        f"  Total optimization steps = {run.total_steps:,} (phases of {shown} steps)",
        f"  {'Packs' if rows else 'Examples'} trained on = {drawn:,}{passes}",
        f"  Decisions = {run.schedule.decisions} ({deciders})",
        f"  ZeRO stage = {zero_stage}",
    ]


def packs_line(packing: Packing) -> str:
    """How many packs the pool is, and how full they are."""
    pool, per_pack = packing.pool, len(packing.lengths) / packing.pool.rows
    full = f"{packing.fill(pool):.1%} full, {per_pack:.1f} samples each"
    return f"{pool.rows:,} of up to {packing.capacity:,} tokens ({full})"


def closing_lines(
    folder: Path, pool: TrainingPool, history: list[dict[str, Any]], monitors: Sequence[RunFile] = ()
) -> list[str]:
    """Lines for the screen, from a finished run's folder, its pool and its log. monitors: what they write there."""
    lines = [*_decision_table(folder, pool), *_losses(history), *cost_lines(folder), f"run folder: {folder}"]
    named = [(name, file.what) for file, names in written(folder, monitors) for name in _folded(names)]
    width = max((len(name) for name, _ in named), default=0)
    return [*lines, *(f"  {name:<{width}}  {what}" for name, what in named)]


def _folded(names: list[str]) -> list[str]:
    """The names, or in one line the first and the last of many."""
    return names if len(names) <= MOST_LINES else [f"{names[0]} ... {names[-1]} ({len(names)})"]


@with_config(ConfigDict(extra="allow"))
class Results(TypedDict):
    """all_results.json as far as it is read again. Seconds are over all starts of the run."""

    training_seconds: NotRequired[float]
    selection_seconds: NotRequired[float]
    samples_scored: NotRequired[int]
    samples_scored_per_second: NotRequired[float]


def cost_lines(folder: Path) -> list[str]:
    """What training took, and what selection took beside it; nothing for a run that has no results yet.

    UserError where all_results.json is not what a run writes.
    """
    path = folder / RESULTS
    if not path.exists():
        return []
    try:
        results: Results = read_record(path, Results)
    except DamagedError as error:
        raise UserError(f"{path}: not the results of a run: {error}; move it away to go on without it") from None
    if "training_seconds" not in results or "selection_seconds" not in results:
        return []  # of an older version
    scored = ""
    if "samples_scored" in results and "samples_scored_per_second" in results:
        rate = f"{results['samples_scored_per_second']:,.1f}/s"
        scored = f" ({results['samples_scored']:,} samples scored, {rate})"
    training, selection = results["training_seconds"], results["selection_seconds"]
    return [f"time: training {training:,.1f} s, selection {selection:,.1f} s{scored}"]


@with_config(ConfigDict(extra="allow"))
class ServedSubtask(TypedDict):
    """picks, and their share of the decision; lowest and highest score, and the share of them picked last time too."""

    picks: int
    share: float
    lowest: NotRequired[float]
    highest: NotRequired[float]
    last: NotRequired[float]


@with_config(ConfigDict(extra="allow"))
class Decision(TypedDict):
    """A file of decisions/ as far as it is read again: indices of a selector, or proportions of a mixer.

    subtasks: where picks serve subtasks of a target, what each got. overlap: shares of the picks that would be in a
    random draw, and that were in the last decision.
    """

    step: int
    component: str
    indices: NotRequired[list[int]]
    proportions: NotRequired[dict[str, float]]
    subtasks: NotRequired[dict[str, ServedSubtask]]
    overlap: NotRequired[dict[str, float | None]]


def told_apart(one: float, other: float, least: int = 3) -> tuple[str, str]:
    """Two numbers in ``least`` digits, or in as many as tell them apart, where they are not equal."""
    for digits in range(least, 18):
        if one == other or f"{one:.{digits}g}" != f"{other:.{digits}g}":
            break
    return f"{one:.{digits}g}", f"{other:.{digits}g}"


def read_decisions(folder: Path, pool: TrainingPool) -> list[Decision]:
    """The records in decisions/, in the order of steps. UserError naming the file that is not one for ``pool``."""
    found: list[Decision] = []
    for path in (folder / "decisions").glob("step_*.json"):
        try:
            found.append(read_record(path, Decision))
            problem = _misfit(found[-1], pool)
        except DamagedError as error:
            problem = str(error)
        if problem:
            raise UserError(f"{path}: not a record of a decision: {problem}; move it away to go on without it")
    return sorted(found, key=lambda record: record["step"])


def _misfit(record: Decision, pool: TrainingPool) -> str | None:
    if "indices" in record:
        size = pool.size
        wrong = [i for i in record["indices"] if i < 0 or (size is not None and i >= size)]
        return f"sample {wrong[0]} is not in the pool" if wrong else None
    missing = [name for name in pool.domain_names if name not in record.get("proportions", {})]
    return f"it has no proportion of '{missing[0]}'" if missing else None


def _decision_table(folder: Path, pool: TrainingPool) -> list[str]:
    """One row per domain: its share of the pool, where its size is known, and of each of the last decisions."""
    decisions = read_decisions(folder, pool)
    if not decisions:
        return []
    names = pool.domain_names
    whole = [("pool", pool.domain_sizes() / len(pool))] if isinstance(pool, Pool) else []
    columns = []
    for record in decisions:
        if "indices" in record:
            picks = np.bincount(pool.domains_of(record["indices"]), minlength=len(names))
            share = picks / max(1, picks.sum())
        else:
            share = np.array([record["proportions"][name] for name in names])
        columns.append((f"step {record['step']}", share))
    kind = "chose" if "indices" in decisions[0] else "mixed"
    head = f"what {decisions[0]['component']} {kind}, as shares of each decision:"
    return [head, *_shares("domain", names, [*whole, *columns[-6:]]), *_subtask_table(decisions)]


def _subtask_table(decisions: list[Decision]) -> list[str]:
    """One row per subtask of the target: its share of each of the last decisions; none where there are no several."""
    names = list(dict.fromkeys(name for record in decisions for name in record.get("subtasks", ())))
    if not 1 < len(names) <= MOST_SUBTASKS:
        return []
    columns = []
    for record in decisions[-6:]:
        share = [record["subtasks"][name]["share"] if name in record.get("subtasks", ()) else 0.0 for name in names]
        columns.append((f"step {record['step']}", np.array(share)))
    return ["which subtask of the target the picks serve:", *_shares("subtask", names, columns)]


def _shares(title: str, names: list[str], columns: list[tuple[str, np.ndarray]]) -> list[str]:
    """A head and a row for each name. columns: (title, shares [names])."""
    width = max(len(title), *(len(name) for name in names))
    head = f"{title:<{width}}" + "".join(f"{of:>10}" for of, _ in columns)
    return [head, *(f"{n:<{width}}" + "".join(f"{s[k]:>10.1%}" for _, s in columns) for k, n in enumerate(names))]


def _losses(history: list[dict[str, Any]]) -> list[str]:
    """First and last loss of training and evaluation, and the last of each part of what is evaluated, worst first."""
    lines = []
    for key, label in (("loss", "training loss"), ("eval_loss", "eval loss")):
        entries = [e for e in history if key in e]
        if entries:
            first, last = entries[0], entries[-1]
            lines.append(
                f"{label}: {first[key]:.4f} at step {first['current_steps']}, "
                f"{last[key]:.4f} at step {last['current_steps']}"
            )
    evaluated: dict[str, Any] = next((e for e in reversed(history) if "eval_loss" in e), {})
    told = [k for k in evaluated if k.startswith("eval_") and k.endswith("_loss") and k != "eval_loss"]
    parts = {k[5:-5]: evaluated[k] for k in told}
    worst = sorted(parts, key=lambda name: -parts[name])
    words = [f"{name} {parts[name]:.4f}" for name in worst[:MOST_LOSSES]]
    if len(worst) > MOST_LOSSES:
        words.append(f"{len(worst) - MOST_LOSSES:,} lower ones in {RESULTS}")
    if words:
        lines.append(f"eval losses at step {evaluated['current_steps']}, worst first: {', '.join(words)}")
    return lines
