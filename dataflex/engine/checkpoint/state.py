"""What of a run is in a checkpoint beside the engine's own files, as plain data, and back into a run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataflex.core.plan import Plan
from dataflex.engine.loop import Loop
from dataflex.utils.errors import UserError


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


def check_identity(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    for key, value in now.items():
        if saved.get(key) != value:
            raise UserError(
                f"{folder}: the checkpoint has {key} {saved.get(key)}, this run has {value}; resume with the "
                "configuration that it was made with, or start in another output_dir"
            )


def state_of(loop: Loop) -> dict[str, Any]:
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


def restore(loop: Loop, state: dict[str, Any]) -> None:
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


def random_state() -> Any:
    return encode(
        {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
    )


def set_random_state(saved: dict[str, Any]) -> None:
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
