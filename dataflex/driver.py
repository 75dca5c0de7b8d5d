"""One YAML run, from a checked config to a finished run folder, inside an already launched process."""

from __future__ import annotations

import json
import logging
import os
import random
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataflex.config import Config
from dataflex.config.components import component_params
from dataflex.config.paths import resolve
from dataflex.core.hook import Hook
from dataflex.core.plan import Schedule
from dataflex.core.registry import REGISTRY
from dataflex.data.collate import Collator
from dataflex.data.load import LoadedData, load_data, load_pool
from dataflex.data.pool import Pool, describe_sample
from dataflex.engine import run_folder
from dataflex.engine.ds_config import check_accepted, check_possible, deepspeed_config, zero_stage
from dataflex.engine.export import export
from dataflex.engine.model import load_model, load_model_config, load_tokenizer
from dataflex.engine.optimizer import forget_dry_step, make_optimizer, make_scheduler, warmup_steps
from dataflex.engine.plugin import DataflexEngine
from dataflex.report.model_card import model_card
from dataflex.report.plot import check_plotting, plot_loss
from dataflex.report.summary import closing_lines, opening_lines, read_decisions
from dataflex.report.trainer_log import LogHook
from dataflex.train.trainer.build import attach, make_schedule
from dataflex.train.trainer.components import load_components
from dataflex.train.trainer.run_hooks import CheckpointHook, EvalHook
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.files import write_atomically
from dataflex.utils.logging import logger


def run(cfg: Config) -> int:
    """Train as ``cfg`` says; every process of the launch calls it. Returns the exit code."""
    _be_quiet()
    check_possible(cfg)
    if cfg.output.plot_loss:
        check_plotting()
    _start_process_group(cfg)
    try:
        train(cfg)
    except UserError:
        raise
    except BaseException:
        # Where rank 0 failed too, the launcher ends this process meanwhile, and the screen shows one traceback.
        time.sleep(3 if dist.rank() else 0)
        raise
    finally:
        dist.shut_down()
    return 0


def train(cfg: Config) -> None:
    """Train as ``cfg`` says, under a started process group; a collective."""
    load_components(cfg.flex.component_modules)
    cfg = _with_packaged_model(cfg)
    start = run_folder.prepare(cfg)
    tokenizer = load_tokenizer(cfg)
    model_config = load_model_config(cfg)
    data = load_data(cfg, tokenizer)
    schedule = _schedule(cfg, len(data.train))
    _say_data(data, tokenizer)
    _seed_everything(cfg.train.seed)
    log = LogHook(cfg.output.logging_steps)
    engine = _build(cfg, model_config, data, tokenizer, schedule, log)
    torch.manual_seed(cfg.train.seed + dist.rank())
    _resume(engine, cfg, start)
    if _complete(engine, cfg):
        return
    _say_run(cfg, engine)
    for batch in engine.batches():
        engine.training_step(batch)
    _finish(cfg, engine, data, tokenizer, log)


def _be_quiet() -> None:
    """Nothing of DeepSpeed's and transformers' own chatter; their warnings once, from rank 0."""
    import transformers
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.WARNING)
    deepspeed_logger.addFilter(_is_news)
    transformers.utils.logging.disable_progress_bar()
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")
        transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*(all_gather_into|reduce_scatter)_tensor.*")


def _is_news(record: logging.LogRecord) -> bool:
    """False for warnings about what is meant so: sgd under ZeRO, a schedule asked for its first rate."""
    text = record.getMessage()
    return "untested optimizer" not in text and "scheduler before it has started" not in text


def _start_process_group(cfg: Config) -> None:
    """Never compile DeepSpeed's shared-memory kernel for CPUs."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed(timeout=timedelta(seconds=cfg.train.ddp_timeout), verbose=False)


def _with_packaged_model(cfg: Config) -> Config:
    """Let model_name_or_path mean a packaged model folder, as configs/models/tiny_llama."""
    name = cfg.model.model_name_or_path
    if not name.startswith("configs/") or Path(name).exists():
        return cfg
    model = cfg.model.model_copy(update={"model_name_or_path": str(resolve(name))})
    return cfg.model_copy(update={"model": model})


def _schedule(cfg: Config, pool_size: int) -> Schedule:
    """The run's schedule, checked against the pool before any model is loaded."""
    train = cfg.train
    global_batch = train.per_device_train_batch_size * train.gradient_accumulation_steps * dist.world_size()
    schedule = make_schedule(
        cfg.flex,
        pool_size=pool_size,
        global_batch=global_batch,
        epochs=train.num_train_epochs,
        fixed=cfg.fixed_steps,
    )
    if "select" in cfg.flex.kinds:
        name, params = component_params(cfg.flex, "select")
        with_replacement = params.get("replacement", getattr(REGISTRY.get("selector", name), "replacement", False))
        asked = max((p.steps for p in schedule.phases if p.decides), default=0) * global_batch
        if asked > pool_size and not with_replacement:
            raise UserError(
                f"update_step: a decision picks update_step x global batch = {asked:,} samples without replacement, "
                f"the pool has {pool_size:,}; lower update_step or the batch size"
            )
    return schedule


def _say_data(data: LoadedData, tokenizer: Any) -> None:
    for line in data.report.lines():
        logger.info(line)
    logger.info(describe_sample(data.train, 0, tokenizer))


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _build(
    cfg: Config, model_config: Any, data: LoadedData, tokenizer: Any, schedule: Schedule, log: LogHook
) -> DataflexEngine:
    """Model, optimizer and engine. Under ZeRO-3 the model is partitioned while it is made."""
    import deepspeed

    text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    config = deepspeed_config(
        cfg,
        world_size=dist.world_size(),
        hidden_size=text_config.hidden_size,
        total_steps=schedule.total_steps,
        warmup_steps=warmup_steps(cfg.train, schedule.total_steps),
    )
    check_accepted(config)
    partitioning = _partition_while_loading(config)
    model = dist.together(lambda: load_model(cfg, model_config, tokenizer))
    arguments: dict[str, Any] = {}
    if "optimizer" not in config:
        arguments["optimizer"] = make_optimizer(model, cfg.train)
        if "scheduler" not in config:
            arguments["lr_scheduler"] = make_scheduler(arguments["optimizer"], cfg.train, schedule.total_steps)
    elif "scheduler" not in config:
        arguments["lr_scheduler"] = lambda optimizer: make_scheduler(optimizer, cfg.train, schedule.total_steps)
    engine, *_ = deepspeed.initialize(
        model=model,
        config=config,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        **arguments,
    )
    del partitioning
    forget_dry_step(engine)
    return attach(
        engine,
        cfg=cfg,
        pool=data.train,
        eval_pool=data.eval,
        mixer_eval_pool=_mixer_eval_pool(cfg, tokenizer),
        collator=_collator(cfg, tokenizer),
        tokenizer=tokenizer,
        hooks=_run_hooks(cfg, log, tokenizer, schedule, len(data.train)),
        workers=cfg.data.dataloader_num_workers,
    )


def _mixer_eval_pool(cfg: Config, tokenizer: Any) -> Pool | None:
    names = cfg.flex.mixer_eval_dataset
    return load_pool(cfg, tokenizer, names, "mixer_eval_dataset") if names else None


def _collator(cfg: Config, tokenizer: Any) -> Collator:
    """Stage pt is packed when it is tokenised. FlashAttention tells packed samples apart in one row only."""
    packing = cfg.packs and cfg.method.stage == "sft"
    rows = cfg.train.per_device_train_batch_size if cfg.model.flash_attn == "fa2" else 1
    return Collator(tokenizer.pad_token_id, packing=packing, cutoff_len=rows * cfg.data.cutoff_len)


def _partition_while_loading(config: dict[str, Any]) -> Any:
    """transformers partitions a model under ZeRO-3 as it loads it while the returned object lives."""
    if zero_stage(config) != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)


def _run_hooks(cfg: Config, log: LogHook, tokenizer: Any, schedule: Schedule, pool_size: int) -> list[Hook]:
    output, train = cfg.output, cfg.train
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps * dist.world_size()
    epoch_steps = max(1, -(-pool_size // per_step))
    hooks: list[Hook] = [log]
    if output.eval_strategy != "no":
        steps = output.eval_steps if output.eval_strategy == "steps" else epoch_steps
        hooks.append(EvalHook(steps or epoch_steps, log))
    if output.save_strategy != "no":
        steps = output.save_steps if output.save_strategy == "steps" else epoch_steps
        hooks.append(CheckpointHook(steps, output.save_total_limit, output.save_only_model, tokenizer))
    return hooks


def _resume(engine: DataflexEngine, cfg: Config, start: Path | None) -> None:
    """Go on from the checkpoint ``start``, and forget what an interrupted run did after it."""
    if start is None:
        return
    engine.load_checkpoint(start.parent, tag=start.name)
    run_folder.drop_later(Path(cfg.output.output_dir), engine.run.step)
    logger.info(f"resumed from {start}, after step {engine.run.step}")


def _complete(engine: DataflexEngine, cfg: Config) -> bool:
    """Whether an earlier start of this run has done all its steps and written everything."""
    run, folder = engine.run, Path(cfg.output.output_dir)
    done = run.step >= run.total_steps
    if not done or not dist.broadcast_object((folder / run_folder.RESULTS).exists()):
        return False
    logger.info(f"the run in {folder} is complete: {run.step} of {run.total_steps} steps are done, nothing to do")
    return True


def _say_run(cfg: Config, engine: DataflexEngine) -> None:
    deciders = ", ".join(f"{kind} by {cfg.flex.component(kind)}" for kind in cfg.flex.kinds) or "static"
    for line in opening_lines(engine.run, deciders, engine.zero_optimization_stage()):
        logger.info(line)


def _finish(cfg: Config, engine: DataflexEngine, data: LoadedData, tokenizer: Any, log: LogHook) -> None:
    """Export the model, write the results and show the last screen."""
    folder = Path(cfg.output.output_dir)
    export(engine, folder, tokenizer)
    if dist.is_main():
        results: dict[str, float] = log.summary(engine.run)
        evaluations = [e for e in log.history if "eval_loss" in e]
        if evaluations:
            results |= {k: v for k, v in evaluations[-1].items() if k.startswith("eval_")}
        write_atomically(folder / "README.md", model_card(cfg, engine.run, data.train, results))
        if cfg.output.plot_loss:
            steps = [record["step"] for record in read_decisions(folder)]
            weighted = "weight" in cfg.flex.kinds and cfg.flex.weight_normalization != "tokens"
            plot_loss(log.history, steps, folder / "training_loss.png", "sample" if weighted else "token")
        write_atomically(folder / run_folder.RESULTS, json.dumps(results, indent=2))
        for line in closing_lines(folder, data.train, log.history):
            logger.info(line)
    dist.barrier()
