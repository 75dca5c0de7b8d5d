"""Reading a checkpoint back into a run, or only its weights into an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dataflex.engine.checkpoint.deepspeed_files import load_deepspeed
from dataflex.engine.checkpoint.manifest import STATE, broken, random_state_file
from dataflex.engine.checkpoint.state import SavedState, check_identity, decode, identity, restore, set_random_state
from dataflex.engine.loop import Loop
from dataflex.utils import dist
from dataflex.utils.errors import UserError, cut
from dataflex.utils.records import DamagedError, fitted


def load(engine: Any, loop: Loop, folder: Path, **how: Any) -> tuple[str, dict[str, Any]]:
    """Restore everything `save` wrote; return the path of DeepSpeed's file and the client_state. A collective.

    how: of DeepSpeed's ``load_checkpoint``. With ``load_module_only`` nothing but the weights is restored.
    UserError for a broken checkpoint, another world size, or a checkpoint of another configuration.
    """
    problem = dist.broadcast_object(broken(folder) if dist.is_main() else None)
    if problem:
        raise UserError(f"{folder}: {problem}")
    state = read_state(folder)
    only_weights = how.get("load_module_only", False)
    check_identity(state["identity"], _layout(engine) if only_weights else identity(loop), folder)
    path, _ = load_deepspeed(engine, folder, strict=not state["frozen"], **how)
    client_state: dict[str, Any] = state["client_state"]
    if only_weights:
        return path, client_state
    restore(loop, state)
    file = folder / random_state_file(dist.rank())
    try:
        set_random_state(read_plain(file))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{file}: holds no random state ({cut(str(error))})") from error
    return path, client_state


def load_weights(engine: Any, folder: Path) -> int:
    """Weights and optimizer state only, of whatever run's checkpoint, to score with; its step. A collective.

    UserError for a broken checkpoint, another world size or another ZeRO stage.
    """
    problem = dist.broadcast_object(broken(folder) if dist.is_main() else None)
    if problem:
        raise UserError(f"{folder}: {problem}")
    state = read_state(folder)
    check_identity(state["identity"], _layout(engine), folder)
    load_deepspeed(engine, folder, strict=not state["frozen"])
    return int(state["step"])


def _layout(engine: Any) -> dict[str, Any]:
    """The part of `identity` that DeepSpeed's own files depend on."""
    return {"world_size": dist.world_size(), "zero_stage": engine.zero_optimization_stage()}


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
