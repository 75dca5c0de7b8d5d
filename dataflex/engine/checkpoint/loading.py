"""Reading a checkpoint back into a run, or only its weights into an engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dataflex.engine.checkpoint.manifest import STATE, broken, random_state_file
from dataflex.engine.checkpoint.state import SavedState, check_identity, decode, identity, restore, set_random_state
from dataflex.engine.loop import Loop
from dataflex.utils import dist
from dataflex.utils.errors import UserError, cut
from dataflex.utils.records import DamagedError, fitted

FORCE_SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def load(engine: Any, loop: Loop, folder: Path) -> dict[str, Any]:
    """Restore everything `save` wrote and return the client_state; a collective.

    UserError for a broken checkpoint, another world size, or a checkpoint of another configuration.
    """
    problem = dist.broadcast_object(broken(folder) if dist.is_main() else None)
    if problem:
        raise UserError(f"{folder}: {problem}")
    state = read_state(folder)
    check_identity(state["identity"], identity(loop), folder)
    with _no_code():
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=not state["frozen"])
    assert path is not None, f"DeepSpeed found no checkpoint in {folder}"
    restore(loop, state)
    file = folder / random_state_file(dist.rank())
    try:
        set_random_state(read_plain(file))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{file}: holds no random state ({cut(str(error))})") from error
    client_state: dict[str, Any] = state["client_state"]
    return client_state


def load_weights(engine: Any, folder: Path) -> int:
    """Weights and optimizer state only, of whatever run's checkpoint, to score with; its step. A collective.

    UserError for a broken checkpoint, another world size or another ZeRO stage.
    """
    problem = dist.broadcast_object(broken(folder) if dist.is_main() else None)
    if problem:
        raise UserError(f"{folder}: {problem}")
    state = read_state(folder)
    now = {"world_size": dist.world_size(), "zero_stage": engine.zero_optimization_stage()}
    check_identity(state["identity"], now, folder)
    with _no_code():
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=not state["frozen"])
    assert path is not None, f"DeepSpeed found no checkpoint in {folder}"
    return int(state["step"])


def read_plain(path: Path) -> Any:
    """What `encode` made of the content of ``path``, decoded. UserError where it cannot be read; no code of it runs."""
    try:
        return decode(torch.load(path, weights_only=True))
    except Exception as error:  # whatever else than a whole file may lie there, its reader says so in many ways
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {cut(str(error))})") from error


def read_state(folder: Path) -> dict[str, Any]:
    """The dataflex state of a checkpoint. UserError where it is not one."""
    try:
        state: dict[str, Any] = fitted(SavedState, read_plain(folder / STATE), STATE)
    except DamagedError as error:
        raise UserError(f"{folder}: {error}") from None
    return state


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
