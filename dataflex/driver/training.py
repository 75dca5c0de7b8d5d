"""`dataflex-cli train`: from a checked config to a finished run folder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from dataflex.config import Config
from dataflex.config.sections.steps import steps_of
from dataflex.config.trackers import reported_to
from dataflex.core.clock import SAVE
from dataflex.core.hook import Hook
from dataflex.core.plan import steps_of_epochs
from dataflex.core.run_files import RunFile
from dataflex.driver.ending import said_stop
from dataflex.driver.estimate import estimate
from dataflex.driver.setup import Inputs, build_engine, read_inputs, stop_of, with_components
from dataflex.engine.folder import own_files, run_folder
from dataflex.engine.plugin import DataflexEngine
from dataflex.report.model_card import model_card
from dataflex.report.plot import plot_loss
from dataflex.report.summary import closing_lines, opening_lines, read_decisions
from dataflex.report.trackers import trackers
from dataflex.report.trainer_log import LogHook
from dataflex.train.trainer.best import Best, hand_over
from dataflex.train.trainer.build import pass_rows
from dataflex.train.trainer.run_hooks import CheckpointHook, EvalHook
from dataflex.utils import dist
from dataflex.utils.files import write_atomically
from dataflex.utils.logging import logger
from dataflex.utils.run_lock import held
from dataflex.utils.stopping import Stop, Stopped


def train(cfg: Config) -> Stop | None:
    """Train as ``cfg`` says, under a started process group; a collective.

    Returns what may have asked this process for an end too late for the run, which is complete; None without steps.
    """
    cfg = with_components(cfg)
    if cfg.score.dry_run:
        inputs = read_inputs(cfg)
        estimate(inputs, build_engine(inputs), training=True)
        return None
    with held(Path(cfg.output.output_dir)):
        return _train(cfg)


def _train(cfg: Config) -> Stop | None:
    begun = run_folder.prepare(cfg)
    start, inputs = begun.checkpoint, read_inputs(cfg)
    if start is not None:  # what the last screen is made from: better said now than after the training
        dist.together(lambda: read_decisions(start.parent, inputs.data.train))
    every = steps_of(cfg.output.logging_steps, inputs.schedule.total_steps)
    log = LogHook(every, partial(trackers, cfg, reported_to(cfg)))
    best = Best.asked(cfg, log)
    engine = build_engine(inputs, _run_hooks(inputs, log, best))
    stop = engine.run.stop = stop_of(cfg)
    run_folder.begin(cfg, begun)
    _resume(engine, cfg, start, best)
    if _complete(engine, cfg):
        return None
    if start is not None:  # config.yaml says how a run is made, so that of a complete one stays
        dist.together(lambda: run_folder.write_config(cfg))
    _say_run(inputs, engine)
    try:
        for batch in engine.batches():
            engine.training_step(batch)
            stop.heed()  # before the first step there is nothing to save
    finally:
        stop.unheed()
        log.close()
    if stop.verdict:
        raise Stopped(said_stop(cfg, engine.run))
    _finish(inputs, engine, log, best)
    return stop


def _run_hooks(inputs: Inputs, log: LogHook, best: Best | None) -> list[Hook]:
    output, train, total = inputs.cfg.output, inputs.cfg.train, inputs.schedule.total_steps
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps * dist.world_size()
    rows = pass_rows(inputs.cfg, inputs.data.train, inputs.packing)
    epoch_steps = steps_of_epochs(1, rows or 0, per_step)
    saves = steps_of(output.save_steps, total) if output.save_strategy == "steps" else epoch_steps
    hooks: list[Hook] = [log]
    if output.eval_strategy != "no":
        asked = output.eval_steps if output.eval_strategy == "steps" else None
        every = epoch_steps if asked is None else steps_of(asked, total)
        hooks.append(EvalHook(every, log, saves if best is not None else None))
    if output.save_strategy != "no":
        hooks.append(CheckpointHook(saves, output.save_total_limit, output.save_only_model, inputs.handover, best))
    return hooks


def _resume(engine: DataflexEngine, cfg: Config, start: Path | None, best: Best | None) -> None:
    """Go on from the checkpoint ``start``, with what was written up to there and nothing later."""
    if start is None:
        return
    engine.load_checkpoint(start.parent, tag=start.name)
    folder = Path(cfg.output.output_dir)
    run_folder.go_on(folder, start, engine.run)
    if start.parent.resolve() == folder.resolve():
        engine.run.stop.last = start
    elif best is not None:
        best.came_from(start.parent)
    if engine.run.step:
        logger.info(f"resumed from {start}, after step {engine.run.step}")


def _complete(engine: DataflexEngine, cfg: Config) -> bool:
    """Whether an earlier start of this run has done all its steps and written everything."""
    run, folder = engine.run, Path(cfg.output.output_dir)
    done = run.step >= run.total_steps
    if not done or not dist.broadcast_object((folder / run_folder.RESULTS).exists()):
        return False
    logger.info(f"the run in {folder} is complete: {run.step} of {run.total_steps} steps are done, nothing to do")
    return True


def _say_run(inputs: Inputs, engine: DataflexEngine) -> None:
    cfg = inputs.cfg
    if inputs.chosen is not None:
        logger.info(inputs.chosen.cost.line)
    named = {kind: cfg.flex.component(kind) or "fixed shares" for kind in cfg.flex.kinds}
    deciders = ", ".join(f"{kind} by {name}" for kind, name in named.items()) or "static"
    for line in opening_lines(engine.run, deciders, engine.zero_optimization_stage()):
        logger.info(line)


def _finish(inputs: Inputs, engine: DataflexEngine, log: LogHook, best: Best | None) -> None:
    """Export the model, write the results and show the last screen."""
    cfg, pool = inputs.cfg, inputs.data.train
    folder = Path(cfg.output.output_dir)
    with engine.run.clock.part(SAVE):
        step = hand_over(engine, inputs.handover, best, cfg.output.save_only_model)
    if dist.is_main():
        results: dict[str, float] = log.summary(engine.run)
        if inputs.chosen is not None:
            results |= inputs.chosen.cost.of_run(results)
        evaluations = [e for e in log.history if "eval_loss" in e and e["current_steps"] <= step]
        if evaluations:
            results |= {k: v for k, v in evaluations[-1].items() if k.startswith("eval_")}
        if best is not None:
            results["best_step"] = step
        card = model_card(cfg, engine.run, pool, results, inputs.handover.stops)
        own_files.write(folder / own_files.CARD, card)
        if cfg.output.plot_loss:
            steps = [record["step"] for record in read_decisions(folder, pool)]
            plot_loss(log.history, steps, folder / "training_loss.png", engine.loss_is_per)
        write_atomically(folder / run_folder.RESULTS, json.dumps(results, indent=2))
        for line in closing_lines(folder, pool, log.history, _monitors(cfg)):
            logger.info(line)
    dist.barrier()


def _monitors(cfg: Config) -> list[RunFile]:
    """What DeepSpeed's monitors write into the run folder."""
    here = [name for name in reported_to(cfg) if name in ("tensorboard", "csv")]
    return [RunFile(cfg.output.run_name or "dataflex", f"figures of {' and '.join(here)}")] if here else []
