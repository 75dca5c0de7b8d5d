"""`dataflex-cli score`: scores, features or token losses of the pool, without training."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.config import Config
from dataflex.config.components import component_params
from dataflex.config.rules.streaming import needs_known_data
from dataflex.core.clock import SCORE
from dataflex.core.registry import REGISTRY
from dataflex.data.chosen import Cost
from dataflex.data.pool import Pool
from dataflex.data.sources.info import find_dataset_dir, read_dataset_infos
from dataflex.data.sources.rows import content_of
from dataflex.driver import scores
from dataflex.driver.estimate import estimate
from dataflex.driver.setup import Inputs, build_engine, read_inputs, stop_of, with_components, without_model
from dataflex.engine import checkpoint
from dataflex.engine.checkpoint.loading import read_state
from dataflex.engine.folder.identity import weights_identity
from dataflex.engine.plugin import DataflexEngine
from dataflex.report.trainer_log import read_log
from dataflex.scoring.kept.token_losses import write_token_losses
from dataflex.scoring.progress import peak_memory_mib
from dataflex.train.selector.base_selector import Selector
from dataflex.train.selector.target_selector import TargetSelector
from dataflex.train.trainer.select_trainer import SelectPlanner
from dataflex.train.trainer.without_model import WithoutModel
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger
from dataflex.utils.run_lock import held


def score(cfg: Config) -> None:
    """Score as ``cfg`` says, under a started process group; a collective."""
    if not cfg.score.score_token_losses and "select" not in cfg.flex.kinds:
        raise UserError("score: needs train_type: dynamic_select with a component_name, or score_token_losses: true")
    needs_known_data(cfg, "score")
    cfg = with_components(without_steps(cfg))
    with held(Path(cfg.output.output_dir)) if not cfg.score.dry_run else nullcontext():
        _score(cfg)


@dataclass(frozen=True)
class Passing:
    """A model that goes over a pool and takes no step.

    start: the checkpoint whose weights it has; None: those that the config names. started: when the command began with
    this, of `time.monotonic`.
    """

    inputs: Inputs
    pool: Pool
    engine: DataflexEngine | WithoutModel
    start: Path | None
    started: float

    @property
    def folder(self) -> Path:
        return Path(self.inputs.cfg.output.output_dir)

    @property
    def selector(self) -> Any:
        planner = self.engine.planner
        assert isinstance(planner, SelectPlanner)
        return planner.selector


def opened(cfg: Config, check: Callable[[Inputs], None] = lambda inputs: None) -> Passing:
    """The pool and the model of a config from `with_components`; a collective.

    A selector by embeddings needs no optimizer and, with a model of its own, none in training either. check: of the
    data, before a model is loaded.
    """
    started = time.monotonic()
    inputs = read_inputs(cfg)
    pool = inputs.data.train
    assert isinstance(pool, Pool)
    check(inputs)
    embeds, other = _embeds(cfg)
    if other is not None:
        if cfg.output.resume_from_checkpoint:
            logger.info(f"resume_from_checkpoint: not used, since {other} (embedding_model) looks at the samples")
        found = without_model(inputs)
        found.run.stop = stop_of(cfg)
        return Passing(inputs, pool, found, None, started)
    start = asked_checkpoint(cfg)
    engine = build_engine(inputs, trains=start is not None or not embeds)
    engine.run.stop = stop_of(cfg)
    if start is not None:
        engine.run.step = checkpoint.load_weights(engine.engine, start)
        logger.info(f"scoring with the weights of {start}, after step {engine.run.step}")
    return Passing(inputs, pool, engine, start, started)


def _embeds(cfg: Config) -> tuple[bool, str | None]:
    """Whether all that is asked for is a selector by embeddings, and whose where they are another model's."""
    if cfg.score.score_token_losses:
        return False, None
    name, params = component_params(cfg.flex, "select")
    embeds = getattr(REGISTRY.get("selector", name), "embeds", False)
    return embeds, params.get("embedding_model") if embeds else None


def without_steps(cfg: Config) -> Config:
    """``cfg`` for its selector alone, where it has one, without mixer and weighter.

    The schedule is one step, which any pool has enough samples for: scoring takes none.
    """
    flex = cfg.flex.model_copy(update={"warmup_step": 0, "update_step": 1, "update_times": 1, "train_step": None})
    if "select" in flex.kinds:
        alone = {
            "train_type": ("dynamic_select",),
            "component_name": flex.component("select"),
            "mixer_eval_dataset": (),
        }
        flex = flex.model_copy(update=alone)
    return cfg.model_copy(update={"flex": flex, "train": cfg.train.model_copy(update={"max_steps": -1})})


def _score(cfg: Config) -> None:
    made = opened(cfg)
    if cfg.score.dry_run:
        estimate(made.inputs, made.engine, training=False)
    elif cfg.score.score_token_losses:
        engine, where = made.engine, made.folder / "token_losses"
        parts = weights_identity(engine, cfg.model.model_name_or_path, moments=False)
        write_token_losses(engine.scorer, made.pool, where, parts, cfg.score.score_shard_samples, engine.run.stop)
        logger.info(f"token losses of {len(made.pool):,} samples: {where}")
    else:
        _write_scores(made)


def asked_checkpoint(cfg: Config) -> Path | None:
    """The checkpoint that resume_from_checkpoint asks for; None for the weights that the model section names."""
    named, folder = cfg.output.resume_from_checkpoint, Path(cfg.output.output_dir)
    if cfg.output.resume_path:
        return Path(cfg.output.resume_path).expanduser()
    if not named:
        return None
    newest = checkpoint.newest_whole(folder)
    if newest is None and named is True:
        raise UserError(f"resume_from_checkpoint: there is no whole checkpoint in {folder}")
    return newest


def _write_scores(made: Passing) -> None:
    cfg, clock, selector = made.inputs.cfg, made.engine.run.clock, made.selector
    name = str(cfg.flex.component("select"))
    if not isinstance(selector, TargetSelector) and not hasattr(selector, "scores"):
        raise UserError(f"component_name: selector '{name}' has no score for each sample; less and loss have")
    if made.start is None and hasattr(selector, "use_plain_gradient") and selector.use_plain_gradient():
        logger.info(f"{name}: gradient_type: sgd, since Adam's moments come only with resume_from_checkpoint")
    if isinstance(selector, TargetSelector) and selector.neighbours is not None:
        logger.warning(
            f"{name}: {selector.limit}: {selector.neighbours:,} is no part of scores, by which all samples may be "
            "chosen; `dataflex-cli embed` writes the neighbours alone"
        )
    clock.start()
    with clock.part(SCORE):
        if isinstance(selector, TargetSelector):
            found = selector.each()
        else:
            found = np.asarray(selector.scores(), dtype=np.float32)[:, None]
    facts = write_files(made, found, **columns_of(selector))
    if facts is not None:
        logger.info(f"scores of {len(made.pool):,} samples: {made.folder / scores.TABLE}")
        logger.info(facts.cost.line)
    dist.barrier()


def columns_of(selector: Selector) -> dict[str, Any]:
    """What `scores.Facts` says of the columns of a selector's scores, and of how picks are taken by them."""
    if not isinstance(selector, TargetSelector):
        replacement = selector.draws and selector.replacement
        return {"aggregate": scores.DRAW if selector.draws else "max", "replacement": replacement}
    single = selector.per == "target"
    return {
        "subtasks": selector.names,
        "tasks": selector.subtasks.names if single else [],
        "task_of": selector.subtasks.ids.tolist() if single else [],
        "order": None if selector.order is None else selector.order.tolist(),
        "aggregate": selector.aggregate,
        "vote_share": selector.vote_share,
    }


def write_files(made: Passing, table: NDArray[Any] | None, **columns: Any) -> scores.Facts | None:
    """Write scores [n, M], which rank 0 has, with what they are of and what they took, and return that; a collective.

    columns: see `columns_of`. None on other ranks.
    """
    cfg, run, passes = made.inputs.cfg, made.engine.run, getattr(made.selector, "passes", None)
    peak_mib = max(dist.gather_objects(peak_memory_mib()))
    if not dist.is_main():
        return None
    assert table is not None
    infos = read_dataset_infos(made.pool.domain_names, find_dataset_dir(cfg.data.dataset_dir, cfg.source))
    warmup_s = 0.0 if made.start is None else seconds_before(made.start)
    cost = Cost(
        selection_seconds=round(time.monotonic() - made.started + warmup_s, 3),
        warmup_seconds=round(warmup_s, 3),
        samples_scored=run.clock.scored,
        samples_scored_per_second=round(run.clock.scored / max(run.clock.seconds[SCORE], 1e-9), 3),
        tokens_scored=run.clock.tokens,
        samples_taken_up=0 if passes is None else passes.taken_up,
        peak_memory_mib=round(peak_mib, 1),
        processes=dist.world_size(),
    )
    facts = scores.Facts(
        pool=made.pool.fingerprint,
        domains=made.pool.domain_names,
        contents=[content_of(info) for info in infos],
        component=str(cfg.flex.component("select")),
        checkpoint=None if made.start is None else str(made.start),
        step=run.step,
        learning_rate=None if made.start is None else _learning_rate(made.start),
        features=None if passes is None or passes.features is None else str(passes.features.resolve()),
        cost=cost,
        **columns,
    )
    facts = scores.with_earlier_cost(made.folder, facts)
    scores.write(made.folder, facts, made.pool, table, made.inputs.data.eval if cfg.data.val_size else None)
    return facts


def seconds_before(start: Path) -> float:
    """Seconds of training that led to a checkpoint, over all starts of its run; 0 where the run had no clock."""
    clocks = [hook["clock"] for hook in read_state(start)["hooks"] if "clock" in hook]
    return float(sum(clocks[0]["seconds"].values())) if clocks else 0.0


def _learning_rate(start: Path) -> float | None:
    """Mean rate of the steps that were logged between the checkpoint before ``start`` and it."""
    if not (start.parent / "trainer_log.jsonl").exists():
        return None
    step = checkpoint.saved_step(start)
    others = [checkpoint.saved_step(p) for p in start.parent.iterdir() if (p / checkpoint.MANIFEST).exists()]
    since = max((other for other in others if other < step), default=0)
    rates = [e["lr"] for e in read_log(start.parent) if "lr" in e and since < e["current_steps"] <= step]
    return float(np.mean(rates)) if rates else None
