"""`dataflex-cli eval`: the losses of datasets, by domain."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.config import Config
from dataflex.config.rules.commands import with_trained_weights
from dataflex.config.rules.streaming import needs_known_data
from dataflex.config.schema import FlexSection
from dataflex.config.sections.weighting import WeightingSection
from dataflex.core.run_files import EVALUATION
from dataflex.data.pool import Pool
from dataflex.data.subtasks import Subtasks
from dataflex.driver.scoring import asked_checkpoint
from dataflex.driver.setup import build_engine, read_inputs, with_components
from dataflex.engine import checkpoint
from dataflex.utils import dist
from dataflex.utils.files import write_atomically
from dataflex.utils.logging import logger


def evaluate(cfg: Config) -> None:
    """Print the token-mean loss of the eval datasets, else of the datasets, by domain and subtask; a collective.

    With the weights that a finished run exported into output_dir, or of a checkpoint that resume_from_checkpoint names.
    What a run's weights give is written into its folder too.
    """
    needs_known_data(cfg, "eval")
    start = asked_checkpoint(cfg)
    trained = cfg if start is not None or cfg.model.adapter_name_or_path else with_trained_weights(cfg)
    inputs = read_inputs(with_components(_only_data(trained)))
    engine = build_engine(inputs, trains=start is not None)
    weights = " with ".join(filter(None, (trained.model.model_name_or_path, trained.model.adapter_name_or_path)))
    if start is not None:
        weights = f"{start}, after step {checkpoint.load_weights(engine.engine, start)}"
    pool = inputs.data.eval or inputs.data.train
    assert isinstance(pool, Pool)
    losses, counts = engine.scorer.losses(pool, reduction="sum", max_samples=cfg.train.per_device_eval_batch_size)
    column = trained.data.subtask_column
    sums = losses.astype(np.float64), counts.astype(np.float64)
    found = by_domain(pool, *sums)
    subtasks = {} if column is None else by_subtask(pool, column, *sums)
    logger.info(f"losses of {weights}:")
    width = max(len(name) for name in (*found, *subtasks))
    for name, row in (*found.items(), *subtasks.items()):
        figures = f"loss {row['loss']:.4f}  perplexity {row['perplexity']:.4g}"
        logger.info(f"{name:<{width}}  {row['samples']:,} samples  {row['tokens']:,} tokens  {figures}")
    if dist.is_main() and (start is not None or trained is not cfg):
        more = {} if column is None else {"subtasks": subtasks}
        path = (Path(cfg.output.output_dir) if start is None else start.parent) / EVALUATION
        write_atomically(path, json.dumps({"weights": weights, "domains": found} | more, indent=2))
        logger.info(f"written to {path}")


def by_domain(pool: Pool, losses: Any, counts: Any) -> dict[str, dict[str, Any]]:
    """{domain, and "all": samples, trained tokens, token-mean loss, perplexity}. losses, counts: sums, float64 [n].

    Without domains in which nothing is trained on.
    """
    domains = np.asarray(pool.domain_ids)
    parts = {name: domains == number for number, name in enumerate(pool.domain_names)}
    if len(parts) > 1:
        parts["all"] = np.ones(len(domains), dtype=bool)
    return _rows(parts, losses, counts)


def by_subtask(pool: Pool, column: str, losses: Any, counts: Any) -> dict[str, dict[str, Any]]:
    """The same for ``<column>_<value>`` of each of the values of a column of the samples, if they are 100 at most."""
    return _rows(dict(Subtasks.of(pool, column).parts()), losses, counts)


def _rows(parts: Mapping[str, Any], losses: Any, counts: Any) -> dict[str, dict[str, Any]]:
    """A row of `by_domain` for each of ``parts``, masks of the samples."""
    found = {}
    for name, mine in parts.items():
        tokens = int(counts[mine].sum())
        if tokens:
            loss = float(losses[mine].sum()) / tokens
            perplexity = math.exp(min(loss, 700.0))
            found[name] = {"samples": int(mine.sum()), "tokens": tokens, "loss": loss, "perplexity": perplexity}
    return found


def _only_data(cfg: Config) -> Config:
    """The datasets to be looked at, without packs, decisions, weights or trackers; a held-out part stays one."""
    data: dict[str, Any] = {"sample_weight": None}
    if cfg.method.stage == "sft":
        data |= {"packing": False, "neat_packing": False}
    if not cfg.data.val_size:
        data |= {"dataset": cfg.data.eval_dataset or cfg.data.dataset, "eval_dataset": ()}
    return cfg.model_copy(
        update={
            "data": cfg.data.model_copy(update=data),
            "flex": FlexSection(component_modules=cfg.flex.component_modules),
            "weighting": WeightingSection(),
            "output": cfg.output.model_copy(update={"report_to": (), "plot_loss": False}),
        }
    )
