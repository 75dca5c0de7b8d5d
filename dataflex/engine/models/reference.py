"""Token losses of a frozen reference model for the samples of a micro-batch: computed, or read from a store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dataflex.engine.ds_config import given_config
from dataflex.engine.models.unpartitioned import whole
from dataflex.forward.counted import Counted
from dataflex.forward.losses import Forward
from dataflex.scoring.checks.head_check import OpenHead
from dataflex.scoring.context import release_gathered
from dataflex.scoring.kept.token_losses import TokenLossStore
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dataflex.config.schema import ModelSection

# `dataflex.engine.steps.loop.MicroBatch` to the reference's token losses [N], 0 where a token does not count.
Reference = Callable[[Any], Tensor]
_MODEL_FILES = ("config.json", "adapter_config.json")


def open_reference(path: str, *, engine: Any, pool: Any, model: ModelSection, open_head: OpenHead) -> Reference:
    """The reference at ``path``: a Hugging Face model or adapter folder, or a `TokenLossStore`; a collective.

    engine: of the model in training, which the reference follows in device, dtype and ZeRO-3. open_head: of a model.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"reference_model_path: there is no folder '{path}'")
    if not any((folder / name).exists() for name in _MODEL_FILES):
        if pool.size is None:
            raise UserError(
                f"reference_model_path: '{path}' is no model, and stored token losses are of known samples, which "
                "streaming: true does not have; name the folder of a model"
            )
        return StoredReference(dist.together(lambda: TokenLossStore.open(folder, pool)))
    return FrozenReference(folder, engine, model.trust_remote_code, open_head)


class StoredReference:
    """Reads the token losses of a micro-batch's samples."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def __call__(self, micro: Any) -> Tensor:
        """float32 [N]; what a row is padded with is 0."""
        out = torch.zeros(micro.labels.shape[0])
        starts = micro.cu_seqlens[:-1].tolist()
        for start, values in zip(starts, self.store.of(micro.sample_ids), strict=True):
            out[start : start + len(values)] = torch.from_numpy(values)
        return out.to(micro.labels.device)


class FrozenReference:
    """A forward of a model of its own; under ZeRO-3 it is partitioned too, in an engine without an optimizer."""

    def __init__(self, folder: Path, engine: Any, trust_remote_code: bool, open_head: OpenHead) -> None:
        own = engine.module
        stage3 = engine.zero_optimization_stage() == 3
        dtype = next(own.parameters()).dtype
        with _partitioning(_stage3_config(engine)) if stage3 else whole():
            model = dist.together(lambda: _load(folder, dtype, trust_remote_code))
        known, asked = model.config.vocab_size, own.config.vocab_size
        if known < asked:
            raise UserError(
                f"reference_model_path: {folder} knows {known} tokens, the model in training {asked}; both need "
                "the same tokenizer"
            )
        model.requires_grad_(False)
        model.config.use_cache = False
        self.model: nn.Module = _engine(model, engine) if stage3 else model.to(engine.device)
        self.model.eval()
        release = partial(release_gathered, self.model) if stage3 else _nothing
        self.losses = Forward(open_head(model, release=release))
        logger.info(f"reference model: {folder}, frozen{', partitioned' if stage3 else ''}")

    @torch.no_grad()
    def __call__(self, micro: Any) -> Tensor:
        """float32 [N]."""
        return self.losses(self.model, micro.inputs, Counted(micro.labels, micro.cu_seqlens)).losses.token_loss


def _nothing() -> None:
    """What a whole model gives back after a forward."""


def _load(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError) as exc:
        words = " ".join(str(exc).split())[:200]
        raise UserError(f"reference_model_path: no fitting weights at '{folder}': {words}") from exc


def _stage3_config(engine: Any) -> dict[str, Any]:
    """What an engine without an optimizer needs, with the thresholds and the dtype of the engine in training."""
    given = given_config(engine)
    kept = ("stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "offload_param")
    zero = {key: given["zero_optimization"][key] for key in kept if key in given["zero_optimization"]}
    half: dict[str, Any] = {key: given[key] for key in ("bf16", "fp16") if key in given}
    return {
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "zero_optimization": {"stage": 3, **zero},
        "steps_per_print": 2**31,
        **half,
    }


def _engine(model: Any, engine: Any) -> Any:
    import deepspeed

    made, *_ = deepspeed.initialize(model=model, config=_stage3_config(engine))
    return made


@contextmanager
def _partitioning(config: dict[str, Any]) -> Iterator[None]:
    """transformers partitions a model as it loads it while the object lives."""
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(config)
    yield
    del alive
