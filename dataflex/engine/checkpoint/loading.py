"""Reading a checkpoint back into a run, or only its weights into an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dataflex.core.context import Run
from dataflex.core.plan import generator
from dataflex.engine.checkpoint.deepspeed_files import load_deepspeed
from dataflex.engine.checkpoint.manifest import STATE, broken, random_state_file
from dataflex.engine.checkpoint.resharding import refuse_nvme
from dataflex.engine.checkpoint.split import Split, check_split
from dataflex.engine.checkpoint.state import (
    SavedState,
    check_identity,
    decode,
    identity,
    restore,
    set_random_state,
    split_of,
)
from dataflex.engine.steps.loop import Loop
from dataflex.utils import dist
from dataflex.utils.errors import UserError, cut
from dataflex.utils.logging import logger
from dataflex.utils.records import DamagedError, fitted


def load(engine: Any, loop: Loop, folder: Path, **how: Any) -> tuple[str, dict[str, Any]]:
    """Restore everything `save` wrote; return the path of DeepSpeed's file and the client_state. A collective.

    how: of DeepSpeed's ``load_checkpoint``. With ``load_module_only`` nothing but the weights is restored.
    UserError for a broken checkpoint, another global batch, or a checkpoint of another configuration.
    """
    problem = dist.broadcast_object(broken(folder) if dist.is_main() else None)
    if problem:
        raise UserError(f"{folder}: {problem}")
    state = read_state(folder)
    only_weights = how.get("load_module_only", False)
    check_identity(state["identity"], _layout(engine) if only_weights else identity(loop), folder)
    if not only_weights:
        check_split(state["identity"], split_of(loop), folder)
    path, _ = load_deepspeed(engine, folder, strict=not state["frozen"], **how)
    client_state: dict[str, Any] = state["client_state"]
    if only_weights:
        return path, client_state
    restore(loop, state)
    _restore_random_state(loop.run, folder, state["identity"]["world_size"])
    return path, client_state


def _restore_random_state(run: Run, folder: Path, saved: int) -> None:
    """The random state of this rank's; where the checkpoint's ``saved`` processes had no such rank, one of its own."""
    file = folder / random_state_file(run.rank if run.rank < saved else 0)
    try:
        set_random_state(read_plain(file))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{file}: holds no random state ({cut(str(error))})") from error
    if run.rank >= saved:  # Python's and numpy's are the same on every rank of a run, torch's are not
        torch.manual_seed(int(generator(run.seed, "new rank", run.step, run.rank).integers(2**63)))
    if saved != run.world_size:
        logger.warning(
            f"{folder}: was saved by {saved} processes, this run has {run.world_size}: samples, order and decisions "
            "are the same; losses differ by the rounding of sums, and where the model has dropout by its masks"
        )


def load_weights(engine: Any, folder: Path) -> int:
    """Weights and optimizer state only, of whatever run's checkpoint, to score with; its step. A collective.

    UserError for a broken checkpoint or another ZeRO stage.
    """
    problem = dist.broadcast_object(broken(folder) if dist.is_main() else None)
    if problem:
        raise UserError(f"{folder}: {problem}")
    state = read_state(folder)
    check_identity(state["identity"], _layout(engine), folder)
    load_deepspeed(engine, folder, strict=not state["frozen"])
    return int(state["step"])


def check_start(folder: Path, now: Split, nvme: bool) -> None:
    """UserError where a run that is split as ``now`` cannot go on with a whole checkpoint; on one rank.

    nvme: whether its optimizer is offloaded to NVMe.
    """
    saved = read_state(folder)["identity"]
    check_split(saved, now, folder)
    if nvme and saved["world_size"] != now.world_size:
        refuse_nvme(folder)


def _layout(engine: Any) -> dict[str, Any]:
    """The part of `identity` that DeepSpeed's own files depend on."""
    return {"zero_stage": engine.zero_optimization_stage()}


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
