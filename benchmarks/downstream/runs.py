"""Runs on the picks, as many steps as are equal or as fit into equal minutes, and their rows."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from downstream import processes
from downstream.picks import Picker, named
from downstream.suites import DEAREST, FULL_POOL, HELD_OUT, SELECTORS, TARGET, training

Curve = dict[int, tuple[float, float]]
PAST = 1.1  # times the lowest loss: picks gone over again and again never came back from there


@dataclass(frozen=True)
class Cost:
    """Quiet seconds of a suite: of each selector's selection, and of a step of so many tokens."""

    selection: dict[str, float]
    step_seconds: float
    step_tokens: float

    @classmethod
    def of(cls, rows: list[dict[str, str]], suite: str) -> Cost | None:
        """From the rows of `calibrate`; None where there are none of the dearest method."""
        mine = {row["method"]: row for row in rows if row["suite"] == suite}
        if DEAREST not in mine:
            return None
        steps, tokens = ([float(row[key]) for row in mine.values()] for key in ("step_seconds", "step_tokens"))
        return cls(
            {method: float(row["selection_seconds"]) for method, row in mine.items()},
            float(np.median(steps)),
            float(np.median(tokens)),
        )

    def step(self, tokens: float) -> float:
        """Seconds of a step of ``tokens``: in proportion to them."""
        return self.step_seconds * tokens / self.step_tokens

    def steps_within(self, method: str, tokens: float, dearest_tokens: float, steps: int) -> int:
        """Steps of ``tokens`` that ``method`` makes in the time of the dearest one's selection and its ``steps``."""
        time = self.selection[DEAREST] + steps * self.step(dearest_tokens)
        return max(0, math.floor((time - self.selection.get(method, 0.0)) / self.step(tokens) + 1e-6))


@dataclass(frozen=True)
class Runs:
    """The runs of a suite. folder: where they go. cost: None, and nothing is known of equal minutes."""

    name: str
    picker: Picker
    folder: Path
    cost: Cost | None

    def row(self, method: str, budget: float, seed: int) -> dict[str, Any]:
        """Train on a method's picks; the line of the CSV."""
        suite, pool = self.picker.suite, self.picker.pool
        picks = self.picker.picks(method, budget, seed)
        minutes = self._steps_of_minutes(method, budget, seed, picks)
        steps = max(suite.steps, minutes or 0)
        curve = self._train(method, budget, seed, picks, steps)
        at = best_within(curve, suite.warm, suite.steps)
        timed_at = None if minutes is None else best_within(curve, suite.warm, minutes)
        equal, timed = curve[at], None if timed_at is None else curve[timed_at]
        domains = np.bincount(pool.domain_ids[picks], minlength=len(pool.domain_names))
        return {
            "suite": self.name,
            "method": method,
            "budget": "" if method == FULL_POOL else budget,
            "seed": seed,
            "pool": len(pool),
            "picks": len(picks),
            "different_picks": len(np.unique(picks)),
            "warm_steps": suite.warm,
            "steps": suite.steps,
            "steps_minutes": "" if minutes is None else minutes,
            "best_step": at - suite.warm,
            "best_step_minutes": "" if timed_at is None else timed_at - suite.warm,
            "target_loss": round(equal[0], 5),
            "held_out_loss": round(equal[1], 5),
            "target_loss_minutes": "" if timed is None else round(timed[0], 5),
            "held_out_loss_minutes": "" if timed is None else round(timed[1], 5),
            "picks_by_domain": " ".join(f"{n}={c}" for n, c in zip(pool.domain_names, domains, strict=True)),
            "mean_tokens": round(float(pool.lengths[picks].mean()), 1),
            "curve": " ".join(f"{step}:{target:.5f}/{held:.5f}" for step, (target, held) in curve.items()),
        }

    def _steps_of_minutes(self, method: str, budget: float, seed: int, picks: Any) -> int | None:
        """Steps after the warm-up that fit into the dearest method's minutes, at an evaluation; None: not known."""
        suite, lengths = self.picker.suite, self.picker.pool.lengths
        if self.cost is None or (method in SELECTORS and method not in self.cost.selection):
            return None
        dearest = lengths[self.picker.picks(DEAREST, budget, seed)].mean() * suite.batch
        fit = self.cost.steps_within(method, lengths[picks].mean() * suite.batch, dearest, suite.steps)
        return fit // suite.every * suite.every

    def _train(self, method: str, budget: float, seed: int, picks: Any, steps: int) -> Curve:
        """A run of the command line; {optimizer steps: losses of the target's two halves}."""
        name = f"{named(method)}_{round(1000 * budget):03d}_{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{name}.picks.json"
        file.write_text(json.dumps([int(i) for i in picks]), encoding="utf-8")
        config = training(self.picker.suite, self.picker.data, seed, file, len(picks), steps)
        folder = self.folder / name
        base = self.folder / f"{name}.yaml"
        base.write_text(yaml.safe_dump(config | {"output_dir": str(folder.resolve())}), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        warm = self.picker.suite.warm
        processes.train(base, self.picker.threads, lambda: is_past(read_curve(folder), warm))
        return until_past(read_curve(folder), warm)


def best_within(curve: Curve, warm: int, steps: int) -> int:
    """Of the evaluations in the ``steps`` after the warm-up the one with the lowest loss on the half that is seen."""
    allowed = [step for step in curve if warm < step <= warm + steps] or [warm]
    return min(allowed, key=lambda step: (curve[step][0], step))


def until_past(curve: Curve, warm: int) -> Curve:
    """The curve to the first evaluation after the warm-up whose seen half is `PAST` times its lowest or more."""
    kept, lowest = {}, math.inf
    for step, losses in sorted(curve.items()):
        kept[step] = losses
        if losses[0] >= PAST * lowest:
            break
        lowest = min(lowest, losses[0] if step > warm else math.inf)
    return kept


def is_past(curve: Curve, warm: int) -> bool:
    """Whether more steps cannot be the best ones."""
    after = {step: losses for step, losses in until_past(curve, warm).items() if step > warm}
    return bool(after) and after[max(after)][0] >= PAST * min(seen for seen, _ in after.values())


def read_curve(folder: Path) -> Curve:
    """{optimizer steps: (target, held out)} of a run's evaluations so far; a line that is being written waits."""
    if not (folder / "trainer_log.jsonl").exists():
        return {}
    lines = (folder / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    lines = [line for line in lines if line.endswith("\n")]
    entries = [entry for entry in map(json.loads, lines) if "eval_loss" in entry]
    return {e["current_steps"]: (e[f"eval_{TARGET}_loss"], e[f"eval_{HELD_OUT}_loss"]) for e in entries}
