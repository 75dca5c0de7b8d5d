"""`dataflex-cli score`: scores, features or token losses of the pool, without training."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.config import Config
from dataflex.config.rules.streaming import needs_known_data
from dataflex.core.clock import SCORE
from dataflex.data.chosen import Cost
from dataflex.data.pool import Pool
from dataflex.data.sources.info import find_dataset_dir, read_dataset_infos
from dataflex.data.sources.rows import content_of
from dataflex.driver import scores
from dataflex.driver.estimate import estimate
from dataflex.driver.setup import Inputs, build_engine, read_inputs, stop_of, with_components
from dataflex.engine import checkpoint
from dataflex.engine.checkpoint.loading import read_state
from dataflex.engine.folder.identity import weights_identity
from dataflex.engine.plugin import DataflexEngine
from dataflex.report.trainer_log import read_log
from dataflex.scoring.kept.token_losses import write_token_losses
from dataflex.scoring.progress import peak_memory_mib
from dataflex.train.selector.target_selector import TargetSelector
from dataflex.train.trainer.select_trainer import SelectPlanner
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger
from dataflex.utils.run_lock import held


def score(cfg: Config) -> None:
    """Score as ``cfg`` says, under a started process group; a collective."""
    if not cfg.score.score_token_losses and "select" not in cfg.flex.kinds:
        raise UserError("score: needs train_type: dynamic_select with a component_name, or score_token_losses: true")
    needs_known_data(cfg, "score")
    cfg = with_components(_without_steps(cfg))
    with held(Path(cfg.output.output_dir)) if not cfg.score.dry_run else nullcontext():
        _score(cfg)


def _without_steps(cfg: Config) -> Config:
    """``cfg`` with a schedule of one step, which any pool has enough samples for: scoring takes none."""
    flex = cfg.flex.model_copy(update={"warmup_step": 0, "update_step": 1, "update_times": 1, "train_step": None})
    return cfg.model_copy(update={"flex": flex, "train": cfg.train.model_copy(update={"max_steps": -1})})


def _score(cfg: Config) -> None:
    started = time.monotonic()
    inputs = read_inputs(cfg)
    pool = inputs.data.train
    assert isinstance(pool, Pool)
    start = asked_checkpoint(cfg)
    engine = build_engine(inputs)
    engine.run.stop = stop_of(cfg)
    if start is not None:
        engine.run.step = checkpoint.load_weights(engine.engine, start)
        logger.info(f"scoring with the weights of {start}, after step {engine.run.step}")
    if cfg.score.dry_run:
        estimate(inputs, engine, training=False)
        return
    folder = Path(cfg.output.output_dir)
    if cfg.score.score_token_losses:
        parts = weights_identity(engine, cfg.model.model_name_or_path, moments=False)
        where = folder / "token_losses"
        write_token_losses(engine.scorer, pool, where, parts, cfg.score.score_shard_samples, engine.run.stop)
        logger.info(f"token losses of {len(pool):,} samples: {where}")
        return
    _write_scores(inputs, pool, engine, start, started)


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


def _write_scores(inputs: Inputs, pool: Pool, engine: DataflexEngine, start: Path | None, started: float) -> None:
    """started: when the command began with this, of time.monotonic()."""
    cfg, clock = inputs.cfg, engine.run.clock
    name = str(cfg.flex.component("select"))
    selector = _selector(engine, name)
    if start is None and hasattr(selector, "use_plain_gradient") and selector.use_plain_gradient():
        logger.info(f"{name}: gradient_type: sgd, since Adam's moments come only with resume_from_checkpoint")
    clock.start()
    aims = isinstance(selector, TargetSelector)
    single = aims and selector.per == "target"
    with clock.part(SCORE):
        found = selector.each() if aims else np.asarray(selector.scores(), dtype=np.float32)[:, None]
    peak_mib = max(dist.gather_objects(peak_memory_mib()))
    if dist.is_main():
        folder, passes = Path(cfg.output.output_dir), getattr(selector, "passes", None)
        features = None if passes is None or passes.features is None else str(passes.features.resolve())
        infos = read_dataset_infos(pool.domain_names, find_dataset_dir(cfg.data.dataset_dir, cfg.source))
        warmup_s = 0.0 if start is None else seconds_before(start)
        cost = Cost(
            selection_seconds=round(time.monotonic() - started + warmup_s, 3),
            warmup_seconds=round(warmup_s, 3),
            samples_scored=clock.scored,
            samples_scored_per_second=round(clock.scored / max(clock.seconds[SCORE], 1e-9), 3),
            tokens_scored=clock.tokens,
            samples_taken_up=0 if passes is None else passes.taken_up,
            peak_memory_mib=round(peak_mib, 1),
            processes=dist.world_size(),
        )
        facts = scores.Facts(
            pool=pool.fingerprint,
            domains=pool.domain_names,
            contents=[content_of(info) for info in infos],
            component=name,
            checkpoint=None if start is None else str(start),
            step=engine.run.step,
            learning_rate=None if start is None else _learning_rate(start),
            features=features,
            cost=cost,
            subtasks=selector.names if aims else [],
            tasks=selector.subtasks.names if single else [],
            task_of=selector.subtasks.ids.tolist() if single else [],
            order=selector.order.tolist() if aims and selector.order is not None else None,
            aggregate=selector.aggregate if aims else scores.DRAW if selector.draws else "max",
            replacement=selector.draws and selector.replacement,
            vote_share=selector.vote_share if aims else None,
        )
        facts = scores.with_earlier_cost(folder, facts)
        scores.write(folder, facts, pool, found, inputs.data.eval if cfg.data.val_size else None)
        logger.info(f"scores of {len(pool):,} samples: {folder / scores.TABLE}")
        logger.info(facts.cost.line)
    dist.barrier()


def seconds_before(start: Path) -> float:
    """Seconds of training that led to a checkpoint, over all starts of its run; 0 where the run had no clock."""
    clocks = [hook["clock"] for hook in read_state(start)["hooks"] if "clock" in hook]
    return float(sum(clocks[0]["seconds"].values())) if clocks else 0.0


def _selector(engine: DataflexEngine, name: str) -> Any:
    planner = engine.planner
    assert isinstance(planner, SelectPlanner)
    if not isinstance(planner.selector, TargetSelector) and not hasattr(planner.selector, "scores"):
        raise UserError(f"component_name: selector '{name}' has no score for each sample; less and loss have")
    return planner.selector


def _learning_rate(start: Path) -> float | None:
    """Mean rate of the steps that were logged between the checkpoint before ``start`` and it."""
    if not (start.parent / "trainer_log.jsonl").exists():
        return None
    step = checkpoint.saved_step(start)
    others = [checkpoint.saved_step(p) for p in start.parent.iterdir() if (p / checkpoint.MANIFEST).exists()]
    since = max((other for other in others if other < step), default=0)
    rates = [e["lr"] for e in read_log(start.parent) if "lr" in e and since < e["current_steps"] <= step]
    return float(np.mean(rates)) if rates else None
