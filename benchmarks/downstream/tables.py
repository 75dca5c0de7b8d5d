"""From finished runs to the docs' tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from downstream.suites import BASELINES, RANDOM, SELECTORS

Row = dict[str, str]
# Of Student's t with so many degrees of freedom: the quantiles at 97.5% and at 80%.
T_QUANTILES = {
    **{1: (12.706, 1.376), 2: (4.303, 1.061), 3: (3.182, 0.978), 4: (2.776, 0.941), 5: (2.571, 0.920)},
    **{6: (2.447, 0.906), 7: (2.365, 0.896), 8: (2.306, 0.889), 9: (2.262, 0.883)},
}


def smallest_difference(spread: float, pairs: int) -> float:
    """The difference that a two-sided paired t-test at 5% finds in 80% of such experiments.

    (t_0.975 + t_0.8) s / sqrt(n) with n - 1 degrees of freedom. spread: s, of the n differences.
    """
    return sum(T_QUANTILES[pairs - 1]) * spread / math.sqrt(pairs)


def is_seen(differences: Sequence[float]) -> bool:
    """Whether a two-sided paired t-test at 5% finds a difference."""
    if len(differences) < 2:
        return False
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return abs(statistics.mean(differences)) > T_QUANTILES[len(differences) - 1][0] * error


def spread_of(values: Sequence[float], digits: int = 4) -> str:
    """``mean ± standard deviation``."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(rows: Sequence[Row], calibrations: Sequence[Row], suite: str, budget: str) -> list[Row]:
    """A line for each method of a suite at a budget; losses are those of the half of the target that nobody saw."""
    mine = [row for row in rows if (row["suite"], row["budget"]) in ((suite, budget), (suite, ""))]
    cost = {row["method"]: row["seconds_per_1000"] for row in calibrations if row["suite"] == suite}
    found = []
    for method in (*SELECTORS, *BASELINES):
        runs = {row["seed"]: row for row in mine if row["method"] == method}
        if not runs:
            continue
        made = {"method": method, "seeds": str(len(runs))}
        for what, key in (("equal steps", "held_out_loss"), ("equal minutes", "held_out_loss_minutes")):
            known = {seed: float(row[key]) for seed, row in runs.items() if row[key]}
            base = {row["seed"]: float(row[key]) for row in mine if row["method"] == RANDOM and row[key]}
            made[what] = spread_of(list(known.values()))
            made[f"{what}, - random"] = _difference(known, base) if method != RANDOM else ""
        made["target loss"] = spread_of([float(row["target_loss"]) for row in runs.values()])
        made["picks by domain"] = _by_domain([row["picks_by_domain"] for row in runs.values()])
        made["s per 1,000"] = cost.get(method, "0")
        found.append(made)
    return found


def _difference(known: dict[str, float], base: dict[str, float]) -> str:
    """The paired difference, with a * where the test finds it, and in brackets the smallest that could be seen."""
    values = [known[seed] - base[seed] for seed in known if seed in base]
    if len(values) < 2:
        return spread_of(values)
    smallest = smallest_difference(statistics.stdev(values), len(values))
    star = " *" if is_seen(values) else ""
    return f"{spread_of(values)}{star} ({smallest:.4f})"


def _by_domain(counted: Sequence[str]) -> str:
    """Shares of the domains among the picks of all seeds, from cells as ``a=3 b=9``."""
    totals: dict[str, int] = {}
    for cell in counted:
        for pair in cell.split():
            name, _, count = pair.rpartition("=")
            totals[name] = totals.get(name, 0) + int(count)
    whole = sum(totals.values())
    return ", ".join(f"{name} {count / whole:.0%}" for name, count in totals.items() if count)


LEGEND = """Loss on the half of the target that nobody saw, at the evaluation where the half that the selectors see has
its lowest (so a run that goes over few picks too often is stopped): mean ± standard deviation over seeds. "- random":
the difference to random seed by seed; * where a two-sided paired t-test at 5% finds one; in brackets the smallest
difference that such a test finds in 80% of experiments, (t_0.975 + t_0.8) s / √n with the differences' s and n - 1
degrees of freedom. Equal minutes: those of less's selection and steps."""


def conditions(rows: Sequence[Row]) -> str:
    """Hardware and versions of the rows, each combination once."""
    keys = ("hardware", "threads", "torch", "deepspeed", "transformers")
    found = {tuple(row[key] for key in keys) for row in rows}
    said = [
        f"{h}, {n} of them for a run; torch {t}, DeepSpeed {d}, transformers {v}" for h, n, t, d, v in sorted(found)
    ]
    return "; or ".join(said)
