"""Reading a checkpoint back into a run, or only its weights into an engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dataflex.engine.checkpoint.manifest import STATE, broken
from dataflex.engine.checkpoint.state import check_identity, decode, identity, restore, set_random_state
from dataflex.engine.loop import Loop
from dataflex.utils import dist
from dataflex.utils.errors import UserError

FORCE_SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def load(engine: Any, loop: Loop, folder: Path) -> dict[str, Any]:
    """Restore everything `save` wrote and return the client_state; a collective.

    UserError for a broken checkpoint, another world size, or a checkpoint of another configuration.
    """
    problem = dist.broadcast_object(broken(folder) if dist.is_main() else None)
    if problem:
        raise UserError(f"{folder}: {problem}")
    state = decode(torch.load(folder / STATE, weights_only=True))
    check_identity(state["identity"], identity(loop), folder)
    with _no_code():
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=not state["frozen"])
    assert path is not None, f"DeepSpeed found no checkpoint in {folder}"
    restore(loop, state)
    set_random_state(torch.load(folder / f"dataflex_random_rank{dist.rank()}.pt", weights_only=True))
    client_state: dict[str, Any] = state["client_state"]
    return client_state


def load_weights(engine: Any, folder: Path) -> int:
    """Weights and optimizer state only, of whatever run's checkpoint, to score with; its step. A collective.

    UserError for a broken checkpoint, another world size or another ZeRO stage.
    """
    problem = dist.broadcast_object(broken(folder) if dist.is_main() else None)
    if problem:
        raise UserError(f"{folder}: {problem}")
    state = decode(torch.load(folder / STATE, weights_only=True))
    now = {"world_size": dist.world_size(), "zero_stage": engine.zero_optimization_stage()}
    check_identity(state["identity"], now, folder)
    with _no_code():
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=not state["frozen"])
    assert path is not None, f"DeepSpeed found no checkpoint in {folder}"
    return int(state["step"])


def deepspeed_globals() -> list[Any]:
    """The classes in DeepSpeed's files that loading without code must be told of."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]


@contextmanager
def _no_code() -> Iterator[None]:
    """Inside, torch.load runs no code that a file names, also where DeepSpeed asks for it."""
    forced = os.environ.get(FORCE_SAFE)
    os.environ[FORCE_SAFE] = "1"
    try:
        with torch.serialization.safe_globals(deepspeed_globals()):
            yield
    finally:
        if forced is None:
            del os.environ[FORCE_SAFE]
        else:
            os.environ[FORCE_SAFE] = forced
