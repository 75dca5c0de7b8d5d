"""`dataflex-cli show`: a decision of a finished run as text, from its folder and the raw data, without a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.config.yaml_reader import read_mapping
from dataflex.data.sources.convert import Converter
from dataflex.data.sources.info import read_dataset_infos
from dataflex.data.sources.rows import content_of, rows_in_files
from dataflex.report.decision_table import Facts, read_facts, read_parts
from dataflex.report.summary import Decision, cost_lines, told_apart
from dataflex.utils.errors import UserError
from dataflex.utils.records import DamagedError, read_record

LONGEST_TEXT = 400
Sample = dict[str, Any]


@dataclass
class Counts:
    """Of one dataset: its samples, how many were picked (each time counts), sums of scores, how many have one."""

    samples: int = 0
    picked: int = 0
    scored: int = 0
    total: float = 0.0
    scored_picks: int = 0
    total_of_picks: float = 0.0


@dataclass
class Found:
    """What one reading of a table brings. first_picks: where nothing is scored, samples to show instead."""

    by_dataset: dict[str, Counts] = field(default_factory=dict)
    highest: list[Sample] = field(default_factory=list)
    lowest: list[Sample] = field(default_factory=list)
    first_picks: list[Sample] = field(default_factory=list)


def show(run: Path, step: int | None = None, top: int = 10) -> list[str]:
    """Lines about the decision after ``step`` optimizer steps, by default the last one, with ``top`` samples each way.

    UserError where ``run`` has no such decision.
    """
    if top < 1:
        raise UserError(f"--top: expected at least 1, got {top}")
    decisions = run / "decisions"
    steps = sorted(int(path.stem.split("_")[1]) for path in decisions.glob("step_*.json"))
    if not steps:
        raise UserError(f"{run}: holds no decisions/step_N.json; a run with a selector or a mixer writes them")
    if step is not None and step not in steps:
        raise UserError(f"--step: {run} has no decision after step {step}; there are {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    table = decisions / f"step_{step}.parquet"
    if not table.exists():
        return [*_proportions(run, decisions / f"step_{step}.json"), *cost_lines(run)]
    facts = read_facts(table)
    found = _read(table, facts, top)
    lines = [*_head(run, facts, found), *_by_dataset(found), *_by_subtask(table.with_suffix(".json")), *cost_lines(run)]
    texts = _Texts(run, facts)
    groups = [("highest scores", found.highest), ("lowest scores", found.lowest)]
    if not facts.scored:
        groups = [(f"{facts.component} gives no scores; the first picks", found.first_picks)]
    for title, samples in groups:
        lines += ["", f"{title}:", *(line for sample in samples for line in texts.lines(sample, samples))]
    return [*lines, *texts.problems]


def _read(table: Path, facts: Facts, top: int) -> Found:
    found = Found()
    for part in read_parts(table):
        rank = part["rank"].fillna(0).to_numpy(dtype=np.int64)
        for name, mine in part.groupby("dataset", sort=False):
            counts = found.by_dataset.setdefault(str(name), Counts())
            times, score = mine["picked"].to_numpy(dtype=np.int64), mine["score"].to_numpy(dtype=np.float64)
            known = ~np.isnan(score)
            counts.samples += len(mine)
            counts.picked += int(times.sum())
            counts.scored += int(known.sum())
            counts.total += float(score[known].sum())
            counts.scored_picks += int(times[known].sum())
            counts.total_of_picks += float((score[known] * times[known]).sum())
        ranked = part[rank > 0].sort_values(["rank", "picked"], ascending=[True, False], kind="stable")
        found.highest += ranked.head(top).to_dict("records")
        found.lowest += ranked.tail(top).to_dict("records")
        found.first_picks += part[part["picked"] > 0].head(top - len(found.first_picks)).to_dict("records")
    place = lambda sample: (sample["rank"], -int(sample["picked"]), sample["sample_id"])  # noqa: E731
    found.highest = sorted(found.highest, key=place)[:top]
    found.lowest = sorted(found.lowest, key=place, reverse=True)[:top]
    return found


def _head(run: Path, facts: Facts, found: Found) -> list[str]:
    size, picked = (sum(getattr(c, key) for c in found.by_dataset.values()) for key in ("samples", "picked"))
    scored = f", {facts.scored:,} of them scored" if facts.scored else ""
    return [f"{run}: after step {facts.step}, {facts.component} picked {picked:,} of {size:,} samples{scored}", ""]


def _by_dataset(found: Found) -> list[str]:
    """One line for each dataset: what it has of the pool and of the picks, and mean scores."""
    size, picked = (sum(getattr(c, key) for c in found.by_dataset.values()) for key in ("samples", "picked"))
    width = max(len("dataset"), *map(len, found.by_dataset))
    heads = ("samples", "of pool", "picked", "of picks", "mean score", "of picked")
    lines = [f"{'dataset':<{width}}" + "".join(f"{head:>12}" for head in heads)]
    for name, c in found.by_dataset.items():
        cells = [f"{c.samples:,}", f"{c.samples / size:.1%}", f"{c.picked:,}", f"{c.picked / max(1, picked):.1%}"]
        cells += _both(_mean(c.total, c.scored), _mean(c.total_of_picks, c.scored_picks))
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
    return lines


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def _both(one: float | None, other: float | None) -> list[str]:
    """Two numbers in digits that tell them apart; - for one that is not there."""
    if one is None or other is None:
        return ["-" if number is None else f"{number:.4g}" for number in (one, other)]
    return list(told_apart(one, other, 4))


def _by_subtask(path: Path) -> list[str]:
    """What a selector's decision did for each subtask of its target, and what it shares with others."""
    record = _record(path)
    lines = []
    if "subtasks" in record:
        tasks = record["subtasks"]
        width = max(len("serves"), *map(len, tasks))
        heads = ("picked", "of picks", "lowest", "highest", "of last")
        lines += ["", f"{'serves':<{width}}" + "".join(f"{head:>12}" for head in heads)]
        for name, task in tasks.items():
            cells = [f"{task['picks']:,}", f"{task['share']:.1%}"]
            cells += _both(task.get("lowest"), task.get("highest"))
            cells.append(f"{task['last']:.1%}" if "last" in task else "-")
            lines.append(f"{name:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
    shared = record.get("overlap", {})
    words = [("random", "would be in a random draw of as many"), ("last", "were in the decision before")]
    told = [f"{share:.1%} {text}" for key, text in words if (share := shared.get(key)) is not None]
    return [*lines, "", f"of the picks {', '.join(told)}"] if told else lines


def _record(path: Path) -> Decision:
    try:
        record: Decision = read_record(path, Decision)
    except DamagedError as error:
        raise UserError(f"{path}: not a record of a decision: {error}") from None
    return record


def _proportions(run: Path, path: Path) -> list[str]:
    """A mixer's decision; UserError where it is a selector's whose table is gone."""
    record = _record(path)
    if "proportions" not in record:
        raise UserError(f"{path.with_suffix('.parquet')}: there is no such table; the run is of an older version")
    shares = [f"  {name}  {share:.1%}" for name, share in record["proportions"].items()]
    head = f"{run}: after step {record['step']}, {record['component']} mixes (it chooses no samples):"
    return [head, *shares]


class _Texts:
    """The samples' texts, read from the raw data that config.yaml names, as long as it is what the run read."""

    def __init__(self, run: Path, facts: Facts) -> None:
        self.run, self.facts = run, facts
        self.problems: list[str] = []
        self._read: dict[str, dict[tuple[str | None, int], list[tuple[str, str]]]] = {}
        config = run / "config.yaml"
        self._config = read_mapping(config, "run's config") if config.exists() else None
        if self._config is None:
            self.problems.append(f"no texts: {run} has no config.yaml, which would name the data")

    def lines(self, sample: Sample, others: list[Sample]) -> list[str]:
        """A sample and its text. others: samples that are shown too, whose texts are read with it."""
        times = int(sample["picked"])
        picked = "not picked" if times == 0 else "picked" if times == 1 else f"picked {times} times"
        row, file = sample["row"], sample["file"]
        where = sample["dataset"] if np.isnan(row) else f"{sample['dataset']}:{int(row)}"
        where += "" if file is None else f" ({file})"
        scored = "" if np.isnan(sample["rank"]) else f"rank {int(sample['rank']):,}  score {sample['score']:.6g}  "
        head = f"  {scored}{picked}  {where}  sample {sample['sample_id']}"
        if np.isnan(row):
            return [head, "    (a packed block, which is not made from one row)"]
        turns = self._of_dataset(sample["dataset"], others).get((file, int(row)), [])
        return [head, *(f"    {role}: {_cut(text)}" for role, text in turns)]

    def _of_dataset(self, name: str, samples: list[Sample]) -> dict[tuple[str | None, int], list[tuple[str, str]]]:
        mine = [s for s in samples if s["dataset"] == name and not np.isnan(s["row"])]
        wanted = {(s["file"], int(s["row"])) for s in mine}
        known = self._read.setdefault(name, {})
        if self._config is not None and not wanted <= known.keys():
            try:
                self._fill(known, name, wanted)
            except UserError as error:
                self._say(f"no texts of '{name}': {error}")
        return known

    def _fill(self, known: dict[tuple[str | None, int], Any], name: str, wanted: set[tuple[str | None, int]]) -> None:
        assert self._config is not None
        info = read_dataset_infos([name], Path(str(self._config.get("dataset_dir", "data"))))[0]
        content = self.facts.contents.get(name)
        if content is not None and content_of(info) != content:
            self._say(f"no texts of '{name}': its data has changed since the run read it ({info.where})")
            return
        converter = Converter(info, str(self._config.get("stage", "sft")))
        for place, row in rows_in_files(info, wanted).items():
            known[place] = list(converter(row, info.where).turns)

    def _say(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)


def _cut(text: str) -> str:
    """The text in one line that a terminal only shows; of a long one its beginning and its end."""
    line = "".join(mark if mark.isprintable() else "\ufffd" for mark in " ".join(text.split()))
    if len(line) <= LONGEST_TEXT:
        return line
    tail = LONGEST_TEXT // 4
    return f"{line[: LONGEST_TEXT - tail]} ... {len(line) - LONGEST_TEXT:,} characters left out ... {line[-tail:]}"
