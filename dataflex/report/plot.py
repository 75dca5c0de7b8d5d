"""training_loss.png: the losses of a run over its steps, with its decisions marked."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from dataflex.utils.errors import UserError


def check_plotting() -> None:
    """UserError where matplotlib is missing: said before a run rather than at its end."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plot_loss: true needs matplotlib: pip install 'dataflex[plot]' (or matplotlib), or drop it")


def plot_loss(history: list[dict[str, Any]], decisions: list[int], path: Path, unit: str) -> None:
    """Draw the training loss, the eval loss where there is one, and a line at each decision's step.

    unit: what a training loss is the mean over (``token``, ``sample``, ...).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(e["current_steps"], e[key]) for e in history if key in e]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
    for number, step in enumerate(decisions):
        axes.axvline(step, color="grey", linestyle=":", label="decision" if number == 0 else None)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"loss per {unit} (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
