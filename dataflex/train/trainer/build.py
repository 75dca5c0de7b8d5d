"""`attach`: the components that a config names, tied to a DeepSpeed engine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dataflex.config import Config
from dataflex.config.components import component_params
from dataflex.config.foreign.interleaving import INTERLEAVED
from dataflex.config.rules.packing import shares_rows
from dataflex.config.sections.steps import steps_of
from dataflex.core.context import Run
from dataflex.core.hook import Hook, TokenWeigher, Weigher
from dataflex.core.packing import Packing
from dataflex.core.plan import Schedule, decision_schedule, epoch_schedule, steps_of_epochs
from dataflex.core.registry import REGISTRY, RUNTIME
from dataflex.core.weights import StaticWeights
from dataflex.data.pool import Pool, TrainingPool
from dataflex.engine.folder.identity import weights_identity
from dataflex.engine.models.embedder import Embedder
from dataflex.engine.models.limits import check_limits
from dataflex.engine.models.reference import open_reference
from dataflex.engine.optimizer_state import read_moments
from dataflex.engine.plugin import DataflexEngine
from dataflex.engine.steps.loop import BatchSource, Loop, Stepper
from dataflex.engine.steps.skip import NonFinite
from dataflex.forward.fused import FusedHead
from dataflex.forward.losses import Forward
from dataflex.scoring.checks.head_check import known_head, open_head
from dataflex.scoring.checks.model_check import check_model, check_packing, refusal
from dataflex.scoring.context import release_gathered
from dataflex.scoring.kept.sharded import ScoringPasses
from dataflex.scoring.scorer import Scorer
from dataflex.train.mixer.interleave import interleaved
from dataflex.train.trainer.component_hooks import HookBuilder
from dataflex.train.trainer.training_head import logit_readers, training_head
from dataflex.train.trainer.weight_trainer import WeightLog
from dataflex.train.weighter.static_weights import static_weights
from dataflex.utils.errors import UserError

if TYPE_CHECKING:
    from dataflex.config.schema import FlexSection

STREAM_PLAN = 65536
_LOOKED_AT = 64
# Of a stream, which is read only in its order.
_ANY_SAMPLE = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}


def attach(
    engine: Any,
    *,
    cfg: Config,
    pool: TrainingPool,
    eval_pool: Pool | None,
    mixer_eval_pool: Pool | None = None,
    collator: Callable[[list[Any]], dict[str, Any]],
    tokenizer: Any = None,
    hooks: Sequence[Hook] = (),
    workers: int = 0,
    packing: Packing | None = None,
) -> DataflexEngine:
    """Tie the components named in ``cfg.flex``, registered ones, to a DeepSpeed engine. packing: of `packing_of`."""
    if getattr(getattr(engine.module, "config", None), "use_cache", False):
        engine.module.config.use_cache = False
    engine.train()
    _check_limits(engine, cfg, pool, eval_pool, mixer_eval_pool)
    sample = _short_sample(pool) if isinstance(pool, Pool) else _ANY_SAMPLE
    if isinstance(pool, Pool):
        check_model(engine, collator([sample]))
    check_packing(engine, collator, sample)
    run = make_run(engine, cfg, pool, packing)
    budget, longest = batch_tokens(cfg, run)
    head_of = partial(_open_head, cfg.train.fused_head, engine, collator([sample]), longest)
    fused = head_of(engine.module, release=partial(release_gathered, engine))
    scoring = Forward(fused, keeps_logits=False)
    scorer = Scorer(engine, collator, budget, lambda names: read_moments(engine, names), scoring)
    scorer.tally = lambda samples, tokens=0: run.clock.add_scored(samples, tokens)
    device = torch.device(engine.device)
    weights = static_weights(cfg.weighting, pool, tokenizer, _vocabulary(engine.module), device)
    builder = HookBuilder(run, cfg, weights, collator, tokenizer)
    builder.runtime |= {"eval_dataset": eval_pool, "mixer_eval_dataset": mixer_eval_pool, "scorer": scorer}
    builder.runtime["passes"] = passes_of(run, cfg, engine)
    builder.runtime["reference_model_path"] = cfg.flex.reference_model_path
    builder.runtime["open_reference"] = partial(
        open_reference, engine=engine, pool=pool, model=cfg.model, open_head=head_of
    )
    builder.runtime["open_embedder"] = partial(Embedder, scorer=scorer, tokenizer=tokenizer, model=cfg.model)
    builder.runtime["open_head"] = partial(_known_head, fused, engine, collator([sample]))
    every = builder.hooks()
    if weights.any or any(isinstance(h, Weigher) for h in (*every, *hooks)):
        every.append(WeightLog(steps_of(cfg.output.logging_steps, run.total_steps), weights))
    every += hooks  # after what dataflex keeps itself: a log or a checkpoint among them holds the whole step
    stepper = _stepper(run, cfg, every, weights, training_head(fused, every, longest))
    source = BatchSource(run, collator, device, workers, weights)
    loop = Loop(run, every, source, stepper, cfg.train.group_by_length and packing is None)
    batch = cfg.train.per_device_eval_batch_size
    wrapped = DataflexEngine(engine, run, loop, scorer, eval_pool, batch, builder.subtasks())
    run.engine = wrapped
    return wrapped


def batch_tokens(cfg: Config, run: Run) -> tuple[int, int]:
    """Tokens that a scoring batch may have, and those of the longest batch of any kind."""
    trained = run.micro_batch * (run.pool.longest if run.packing is None else run.packing.capacity)
    budget = cfg.flex.scoring_batch_tokens or trained
    return budget, max(budget, trained)


def _stepper(run: Run, cfg: Config, hooks: list[Hook], weights: StaticWeights, fused: FusedHead | None) -> Stepper:
    """On the engine that ``run`` begins with."""
    weighted = weights.any or any(isinstance(hook, Weigher | TokenWeigher) for hook in hooks)
    normalization = cfg.flex.weight_normalization if weighted else "tokens"
    policy = NonFinite(cfg.train.nonfinite, cfg.train.nonfinite_limit)
    training = Forward(fused, keeps_logits=bool(logit_readers(hooks)))
    return Stepper(run.engine, run, hooks, normalization, weights.class_weight, policy, training)


def _open_head(
    mode: str, engine: Any, batch: dict[str, Any], tokens: int, module: nn.Module, *, release: Callable[[], None]
) -> FusedHead | None:
    """`open_head` of the model in training, or of another one on the same device."""
    return open_head(mode, module, batch, tokens, device=torch.device(engine.device), release=release)


def _known_head(fused: FusedHead | None, engine: Any, batch: dict[str, Any]) -> FusedHead:
    """The output layer of the model in training; UnknownHead where no losses are made inside of it."""
    release = partial(release_gathered, engine)
    return fused or known_head(engine.module, batch, device=torch.device(engine.device), release=release)


def _short_sample(pool: Pool) -> dict[str, Any]:
    """The shortest of the first samples that has two tokens."""
    candidates = np.arange(min(len(pool), _LOOKED_AT))
    lengths = pool.lengths[candidates]
    longer = candidates[lengths > 1] if (lengths > 1).any() else candidates
    return pool[longer[pool.lengths[longer].argmin()]]


def _check_limits(engine: Any, cfg: Config, train: Any, target: Any, mixers: Any) -> None:
    """`check_limits` with the words of a YAML run, or of data that came as objects."""
    from_yaml = bool(cfg.data.dataset)
    pools = {"dataset" if from_yaml else "train_dataset": train, "eval_dataset": target, "mixer_eval_dataset": mixers}
    advice = "set cutoff_len:" if from_yaml else "cut the samples to"
    check_limits(engine.module, pools, advice, cfg.model.train_from_scratch, partial(refusal, engine))


def passes_of(run: Run, cfg: Config, engine: Any) -> ScoringPasses:
    """How the selector's passes over the pool are cut into shards, and where they are kept."""
    base = f"{cfg.model.model_name_or_path} {cfg.model.adapter_name_or_path or ''}".strip()
    component = ""
    if "select" in cfg.flex.kinds:
        name, params = component_params(cfg.flex, "select")
        cls, code = REGISTRY.get("selector", name), REGISTRY.code_of("selector", name)
        decides_by = getattr(cls, "decides_by", ())
        every = REGISTRY.effective("selector", name, params, RUNTIME)
        scores_by = {key: value for key, value in every.items() if key not in decides_by}
        component = f"{name} {json.dumps(scores_by, sort_keys=True, default=str)} {code}".rstrip()
    features_dir = cfg.score.features_dir
    return ScoringPasses(
        folder=run.output_dir,
        component=component,
        weights=lambda moments: weights_identity(engine, base, moments),
        shard_samples=cfg.score.score_shard_samples,
        keep_features=cfg.score.keep_features,
        features_dir=Path(features_dir) if features_dir else None,
        step=lambda: run.step,
        stop=lambda: run.stop,
    )


def packing_of(cfg: Config, pool: TrainingPool) -> Packing | None:
    """How the samples of the pool share rows, or None where they do not. UserError for one longer than a row."""
    if not shares_rows(cfg):
        return None
    assert isinstance(pool, Pool), "the configuration refuses packs of streams"
    longest = int(pool.lengths.argmax())
    if pool.longest > cfg.data.cutoff_len:
        raise UserError(
            f"packing: sample {longest} ({pool.whence(longest)}) has {pool.longest:,} tokens, a row holds cutoff_len "
            f"{cfg.data.cutoff_len:,}; raise it, or cut the samples"
        )
    return Packing(pool.lengths, cfg.data.cutoff_len)


def pass_rows(cfg: Config, pool: TrainingPool, packing: Packing | None) -> int | None:
    """Rows of a pass over the pool: samples, or packs; None of streams. Of ``sampling_samples`` packs in proportion."""
    samples = cfg.weighting.epoch(pool.size)
    if "mix" in cfg.flex.kinds and cfg.flex.mix_strategy in INTERLEAVED and isinstance(pool, Pool):
        return _interleaved_rows(cfg, pool, packing)
    if packing is None or samples is None:
        return samples
    return -(-packing.pool.rows * samples // len(packing.lengths))


def _interleaved_rows(cfg: Config, pool: Pool, packing: Packing | None) -> int:
    """Rows of a pass in which the datasets are interleaved; packs in proportion to its tokens."""
    sizes, over = pool.domain_sizes(), cfg.flex.mix_strategy == "interleave_over"
    shares = cfg.flex.init_mixture_proportions
    for name, size, share in zip(pool.domain_names, sizes, shares or [1.0] * len(sizes), strict=True):
        if share and not size:
            raise UserError(f"dataset: '{name}' has no samples, so no pass that interleaves it has an end")
    samples = interleaved(tuple(sizes.tolist()), shares, over, cfg.train.seed)
    if packing is None:
        return samples
    tokens = np.bincount(pool.domain_ids, weights=pool.lengths, minlength=len(sizes))
    weights = np.array(shares or [1.0] * len(sizes)) / sum(shares or [1.0] * len(sizes))
    drawn = samples * float((weights * tokens / np.maximum(sizes, 1)).sum())
    return max(1, math.ceil(packing.pool.rows * drawn / tokens.sum()))


def make_schedule(
    flex: FlexSection, *, pool_size: int | None, global_batch: int, epochs: float, fixed: int | None
) -> Schedule:
    """The schedule of a run (design section 4); ``fixed``: total steps where train_step or max_steps sets them.

    pool_size: rows of a pass (`pass_rows`); None of streams, which have no epochs: what decides nothing is then planned
    for STREAM_PLAN samples at a time. global_batch: rows. UserError where the run would end before anything is decided.
    """
    epoch_steps, by_epochs = max(1, STREAM_PLAN // global_batch), 0
    if pool_size is not None:
        epoch_steps = steps_of_epochs(1, pool_size, global_batch)
        by_epochs = steps_of_epochs(epochs, pool_size, global_batch)
    mixes_fixed = "mix" in flex.kinds and flex.mixes_fixed
    if mixes_fixed or not {"select", "mix"} & set(flex.kinds):
        asked = mixes_fixed and flex.update_step and flex.update_times > 0
        total = flex.warmup_step + (flex.update_step or 0) * flex.update_times if asked else by_epochs
        schedule = epoch_schedule(fixed or total, epoch_steps)
    else:
        assert flex.update_step is not None, "the config's checks refuse a missing update_step"
        schedule = decision_schedule(
            warmup_step=flex.warmup_step,
            update_step=flex.update_step,
            update_times=flex.update_times,
            train_step=fixed,
            epoch_steps=by_epochs,
        )
    decides = set(flex.kinds) - ({"mix"} if mixes_fixed else set())
    if decides and flex.warmup_step >= schedule.total_steps:
        raise UserError(
            f"warmup_step: {flex.warmup_step} leaves no step after the warm-up: the run ends after "
            f"{schedule.total_steps} steps"
        )
    return schedule


def make_run(engine: Any, cfg: Config, pool: TrainingPool, packing: Packing | None) -> Run:
    micro = engine.train_micro_batch_size_per_gpu()
    accumulation = engine.gradient_accumulation_steps()
    world_size = engine.dp_world_size
    schedule = make_schedule(
        cfg.flex,
        pool_size=pass_rows(cfg, pool, packing),
        global_batch=micro * accumulation * world_size,
        epochs=cfg.train.num_train_epochs,
        fixed=cfg.fixed_steps,
    )
    return Run(
        schedule=schedule,
        seed=cfg.train.order_seed,
        micro_batch=micro,
        accumulation=accumulation,
        world_size=world_size,
        rank=engine.global_rank,
        output_dir=Path(cfg.output.output_dir) if cfg.output.output_dir else None,
        engine=engine,
        pool=pool,
        packing=packing,
    )


def _vocabulary(module: torch.nn.Module) -> int | None:
    """Columns of the logits, as the output layer or the config has them."""
    find = getattr(module, "get_output_embeddings", None)
    columns = getattr(find() if find is not None else None, "out_features", None)
    config = getattr(module, "config", None)
    return columns if columns is not None else getattr(config, "vocab_size", None)
