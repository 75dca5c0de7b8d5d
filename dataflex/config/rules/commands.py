"""The keys that a command cannot do without, and those of a finished run that export and eval start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataflex.config.schema import Config

# These look at a model and train nothing, so that most of a run's keys say nothing.
ONLY_LOOK = ("eval", "export")
# These take a selector of the config, and have no steps.
NO_STEPS = ("score", "embed", "select")
# Of these, the one that reads neither a model nor a target.
CHOOSES = "select"


def missing(cfg: Config, command: str) -> Iterator[str]:
    """The keys that ``command`` needs and ``cfg`` lacks."""
    absent = {"model_name_or_path": not cfg.model.model_name_or_path} if command != CHOOSES else {}
    if command == "export":
        absent["export_dir"] = not cfg.export.export_dir
    elif command == "eval":
        absent["dataset"] = not (cfg.data.dataset or cfg.data.eval_dataset)
    else:
        named = command == CHOOSES and cfg.score.select_from and cfg.score.select_dir
        absent |= {"dataset": not cfg.data.dataset, "output_dir": not (cfg.output.output_dir or named)}
    yield from (key for key, lacks in absent.items() if lacks)


def with_trained_weights(cfg: Config) -> Config:
    """``cfg`` with the adapter, or the model, that a finished run has exported into its output_dir."""
    output = cfg.output.output_dir
    if not output:
        return cfg
    if (Path(output) / "adapter_config.json").exists():
        changes: dict[str, Any] = {"adapter_name_or_path": output}
    elif (Path(output) / "config.json").exists():
        changes = {"model_name_or_path": output, "train_from_scratch": False}
    else:
        return cfg
    return cfg.model_copy(update={"model": cfg.model.model_copy(update=changes)})
