"""`load_best_model_at_end`: by which figure of the evaluation the best checkpoint is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dataflex.utils.errors import cut, nearest

if TYPE_CHECKING:
    from dataflex.config.schema import Config, DataSection, OutputSection

_KEYS = ("metric_for_best_model", "greater_is_better")


def metric_of(output: OutputSection, data: DataSection) -> str:
    """The figure's name as the log has it; transformers lets it be written without ``eval_``."""
    asked = output.metric_for_best_model or "eval_loss"
    name = asked if asked.startswith("eval_") else f"eval_{asked}"
    domains = _domains(data)
    return "eval_loss" if len(domains) == 1 and name == f"eval_{domains[0]}_loss" else name


def _domains(data: DataSection) -> tuple[str, ...]:
    return data.eval_dataset or data.dataset


def problems(cfg: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys, text) of what a choice of the best checkpoint lacks; the first key is where it is reported."""
    output = cfg.output
    if not output.load_best_model_at_end:
        return
    if output.eval_strategy == "no":
        text = "true chooses by an evaluation; set eval_strategy: steps or epoch"
        yield ("load_best_model_at_end", "eval_strategy"), text
    if output.save_strategy == "no":
        text = "true chooses among checkpoints; set save_strategy: steps or epoch"
        yield ("load_best_model_at_end", "save_strategy"), text
    domains = _domains(cfg.data)
    there = ["eval_loss", *(f"eval_{name}_loss" for name in domains if len(domains) > 1)]
    if metric_of(output, cfg.data) not in there:
        asked = output.metric_for_best_model or ""
        text = f"'{cut(asked)}' is not evaluated{nearest(asked, there)}; there are {', '.join(there)}"
        yield ("metric_for_best_model", "load_best_model_at_end", "eval_dataset", "dataset"), text


def notes(cfg: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys, text) of keys that change nothing."""
    for key in _KEYS:
        if getattr(cfg.output, key) is not None and not cfg.output.load_best_model_at_end:
            yield (key,), "not used without load_best_model_at_end: true"
