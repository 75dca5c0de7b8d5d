"""A selector that looks at samples through a model of its own alone, without an engine and a model in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch

from dataflex.config import Config
from dataflex.core.context import Run
from dataflex.core.hook import Planner
from dataflex.core.packing import Packing
from dataflex.core.weights import NO_WEIGHTS
from dataflex.data.pool import Pool
from dataflex.engine.models.embedder import Embedder
from dataflex.scoring.scorer import Scorer
from dataflex.train.trainer.build import batch_tokens, make_run, passes_of
from dataflex.train.trainer.component_hooks import HookBuilder
from dataflex.utils import dist


@dataclass(frozen=True)
class WithoutModel:
    """What is asked of a `DataflexEngine` where nothing is trained."""

    run: Run
    scorer: Scorer
    planner: Planner


class _NoEngine:
    """What is asked of a DeepSpeed engine besides its model."""

    module = None

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.device, self._train = device, cfg.train
        self.dp_world_size, self.global_rank = dist.world_size(), dist.rank()

    def train_micro_batch_size_per_gpu(self) -> int:
        return self._train.per_device_train_batch_size

    def gradient_accumulation_steps(self) -> int:
        return self._train.gradient_accumulation_steps


def attach_without_model(
    cfg: Config,
    *,
    pool: Pool,
    target: Pool | None,
    collator: Callable[[list[Any]], dict[str, Any]],
    tokenizer: Any,
    packing: Packing | None,
    device: torch.device,
    dtype: torch.dtype,
) -> WithoutModel:
    """The selector of ``cfg``, one with ``embeds`` and a model of its own. dtype: that of a model in training."""
    engine = _NoEngine(cfg, device)
    run = make_run(engine, cfg, pool, packing)
    scorer = Scorer(engine, collator, batch_tokens(cfg, run)[0], _nothing)
    scorer.tally = run.clock.add_scored
    builder = HookBuilder(run, cfg, NO_WEIGHTS, collator, tokenizer)
    embedder = partial(Embedder, scorer=scorer, tokenizer=tokenizer, model=cfg.model, dtype=dtype)
    builder.runtime |= {
        "eval_dataset": target,
        "mixer_eval_dataset": None,
        "scorer": scorer,
        "passes": passes_of(run, cfg, engine),
        "reference_model_path": cfg.flex.reference_model_path,
        "open_reference": _nothing,
        "open_head": _nothing,
        "open_embedder": embedder,
    }
    planner = builder.hooks()[0]
    assert isinstance(planner, Planner)
    return WithoutModel(run, scorer, planner)


def _nothing(*_arguments: Any, **_named: Any) -> NoReturn:
    raise AssertionError("a selector with `embeds` and an embedding_model asks for no model in training")
