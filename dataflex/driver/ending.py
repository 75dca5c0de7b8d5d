"""The last line of a run that was asked to end before its last step."""

from __future__ import annotations

from dataflex.config import Config
from dataflex.core.context import Run


def said_stop(cfg: Config, run: Run) -> str:
    """Where the run stopped, what is saved of it, and how it goes on."""
    return (
        f"stopped after step {run.step} of {run.total_steps} ({run.stop.reason}): {_saved(cfg, run)}; {_next(cfg, run)}"
    )


def _saved(cfg: Config, run: Run) -> str:
    stop, output = run.stop, cfg.output
    if stop.last is not None and stop.last.name == f"checkpoint-{run.step}":
        return f"saved {stop.last}"
    if output.save_only_model or output.save_strategy == "no":
        key = "save_only_model: true" if output.save_only_model else "save_strategy: no"
        return f"nothing is saved to go on from ({key})"
    after = f"after {stop.last}" if stop.last is not None else "yet"
    return (
        f"nothing is saved {after}, since the last save took {stop.save_s:.0f} s and stop_grace_seconds is "
        f"{output.stop_grace_seconds:g}"
    )


def _next(cfg: Config, run: Run) -> str:
    output = cfg.output
    if run.stop.last is None and output.save_only_model:
        return "start over with overwrite_output_dir=true"
    if run.stop.last is None:
        return "the same command starts over"
    takes_newest = output.resume_from_checkpoint in (True, "auto")
    if takes_newest or (output.resume_from_checkpoint is None and not output.overwrite_output_dir):
        return "the same command goes on from there"
    return "to go on from there, give resume_from_checkpoint=auto"
