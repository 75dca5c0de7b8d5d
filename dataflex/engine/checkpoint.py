"""Checkpoints that count only when whole.

A checkpoint is a folder with DeepSpeed's files, ``dataflex_state.pt`` (steps, plan, hooks; rank-identical),
``dataflex_random_rank<r>.pt`` and, written last, ``dataflex_manifest.json`` with every file's size and sha256.
The pointer ``latest`` beside it is renamed into place after that. A folder without a matching manifest is a
broken checkpoint and is passed over with a warning.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataflex import __version__
from dataflex.core.plan import Plan
from dataflex.engine.loop import Loop
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.files import sha256_of, write_atomically
from dataflex.utils.logging import logger

STATE = "dataflex_state.pt"
MANIFEST = "dataflex_manifest.json"
POINTER = "latest"
FORCE_SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def save(engine: Any, loop: Loop, folder: Path, client_state: dict[str, Any]) -> None:
    """Write a checkpoint into the new ``folder``; a collective. UserError if the folder holds one already."""
    if dist.broadcast_object((folder / MANIFEST).exists()):
        raise UserError(f"{folder}: is a checkpoint already; a tag is never written twice")
    frozen = any(not p.requires_grad for p in engine.module.parameters())
    state = encode(_state(loop) | {"client_state": client_state, "frozen": frozen})
    if dist.is_main():
        _clear(folder)
    dist.barrier()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(_random_state(), folder / f"dataflex_random_rank{dist.rank()}.pt")
    engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=frozen)
    if dist.is_main():
        torch.save(state, folder / STATE)
    dist.barrier()
    if dist.is_main():
        files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        manifest = {
            "step": loop.run.step,
            "world_size": dist.world_size(),
            "dataflex": __version__,
            "files": {name: {"size": p.stat().st_size, "sha256": sha256_of(p)} for name, p in files.items()},
        }
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))
        write_atomically(folder.parent / POINTER, folder.name)
    dist.barrier()


def _clear(folder: Path) -> None:
    """Remove what a save that did not finish left in ``folder``."""
    for pattern in ("*_states.pt", "dataflex_*", ".dataflex_*"):
        for path in folder.glob(pattern):
            path.unlink()


def load(engine: Any, loop: Loop, folder: Path) -> dict[str, Any]:
    """Restore everything `save` wrote and return the client_state; a collective.

    UserError for a broken checkpoint, another world size, or a checkpoint of another configuration.
    """
    problem = dist.broadcast_object(broken(folder) if dist.is_main() else None)
    if problem:
        raise UserError(f"{folder}: {problem}")
    state = decode(torch.load(folder / STATE, weights_only=True))
    _check_identity(state["identity"], identity(loop), folder)
    with _no_code():
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=not state["frozen"])
    assert path is not None, f"DeepSpeed found no checkpoint in {folder}"
    _restore(loop, state)
    _set_random_state(torch.load(folder / f"dataflex_random_rank{dist.rank()}.pt", weights_only=True))
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
    _check_identity(state["identity"], now, folder)
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


def newest_whole(directory: Path) -> Path | None:
    """The whole checkpoint with the most steps in ``directory``, the same on every rank; None if none is."""
    return dist.broadcast_object(newest_whole_here(directory) if dist.is_main() else None)


def newest_whole_here(directory: Path) -> Path | None:
    """`newest_whole` without its broadcast, for code that runs on one rank."""
    folders = [p for p in directory.glob("*") if p.is_dir() and (p / STATE).exists()]
    folders += [p for p in directory.glob("checkpoint-*") if p.is_dir() and p not in folders]
    for folder in sorted(folders, key=step_of, reverse=True):
        problem = broken(folder)
        if problem is None:
            return folder
        logger.warning(f"{folder}: not a whole checkpoint, passed over: {problem}")
    return None


def broken(folder: Path) -> str | None:
    """Why ``folder`` is not a whole checkpoint, or None if it is: compares every file with the manifest."""
    if not folder.is_dir():
        return "there is no such checkpoint"
    if not (folder / MANIFEST).exists():
        return f"it has no {MANIFEST} (the save did not finish)"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError) as exc:
        return f"{MANIFEST} cannot be read ({type(exc).__name__})"
    for name, expected in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"] or sha256_of(path) != expected["sha256"]:
            return f"{name} differs from what was saved"
    return None


def identity(loop: Loop) -> dict[str, Any]:
    """What must be the same for a resume to go on with the same run."""
    run = loop.run
    return {
        "world_size": run.world_size,
        "micro_batch": run.micro_batch,
        "gradient_accumulation": run.accumulation,
        "seed": run.seed,
        "pool": run.pool.fingerprint,
        "hooks": [hook.identity for hook in loop.hooks],
        "zero_stage": run.engine.zero_optimization_stage(),
    }


def _check_identity(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    for key, value in now.items():
        if saved.get(key) != value:
            raise UserError(
                f"{folder}: the checkpoint has {key} {saved.get(key)}, this run has {value}; resume with the "
                "configuration that it was made with, or start in another output_dir"
            )


def _state(loop: Loop) -> dict[str, Any]:
    run, plan = loop.run, loop.plan
    assert plan is not None, "save a checkpoint after the first step"
    phase = run.schedule.phases[loop.planned_phase]
    return {
        "identity": identity(loop),
        "step": run.step,
        "phase": [phase.index, phase.start, phase.steps],
        "sample_ids": plan.sample_ids,
        "probabilities": plan.probabilities,
        "hooks": [hook.state_dict() for hook in loop.hooks],
    }


def _restore(loop: Loop, state: dict[str, Any]) -> None:
    run = loop.run
    run.step = state["step"]
    for hook, saved in zip(loop.hooks, state["hooks"], strict=True):
        hook.load_state_dict(saved)
    if run.step >= run.total_steps:
        return
    phase = run.schedule.phase_at(run.step)
    if [phase.index, phase.start, phase.steps] == state["phase"]:
        loop.plan, loop.planned_phase = Plan(state["sample_ids"], state["probabilities"]), phase.index
    elif phase.start != run.step and loop.planner.decides:
        raise UserError(
            f"the checkpoint is at step {run.step}, inside a phase of {state['phase'][2]} steps from step "
            f"{state['phase'][1]}; this run's schedule has {phase.steps} from {phase.start} there"
        )


def step_of(folder: Path) -> int:
    """The number at the end of a checkpoint folder's name, -1 without one."""
    digits = re.search(r"(\d+)$", folder.name)
    return int(digits.group(1)) if digits else -1


def _random_state() -> Any:
    return encode(
        {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
    )


def _set_random_state(saved: dict[str, Any]) -> None:
    state = decode(saved)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def encode(value: Any, at: str = "") -> Any:
    """Replace numpy arrays by tensors under a marker, so that the file loads with weights_only=True.

    UserError naming the place ``at`` which something else than numbers, text, bytes, lists, tuples, dicts,
    numeric arrays and tensors was found.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return {"__array__": torch.from_numpy(np.array(value, order="C"))}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {k: encode(v, f"{at}.{k}" if at else str(k)) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(encode(v, f"{at}.{i}" if at else str(i)) for i, v in enumerate(value))
    if value is None or type(value) in (bool, int, float, str, bytes, torch.Tensor):
        return value
    raise UserError(
        f"checkpoint: cannot save a {type(value).__name__} (in {at}); "
        "valid: numbers, text, lists, dicts, numeric arrays and tensors"
    )


def decode(value: Any) -> Any:
    """Undo `encode`."""
    if isinstance(value, dict):
        return value["__array__"].numpy() if set(value) == {"__array__"} else {k: decode(v) for k, v in value.items()}
    return type(value)(decode(v) for v in value) if isinstance(value, list | tuple) else value
