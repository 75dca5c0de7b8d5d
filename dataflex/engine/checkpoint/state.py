"""What of a run is in a checkpoint beside the engine's own files, as plain data, and back into a run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import ConfigDict, Field, with_config
from typing_extensions import NotRequired, TypedDict

from dataflex.core.plan import Plan
from dataflex.engine.checkpoint.split import Split, compared_by
from dataflex.engine.steps.loop import Loop
from dataflex.utils.errors import UserError, cut, shown


@with_config(ConfigDict(arbitrary_types_allowed=True, strict=True, extra="allow"))
class SavedState(TypedDict):
    """What `dataflex_state.pt` holds. sample_ids, probabilities, starts: of the phase's plan (starts: if packed).

    nonfinite: how many steps up to here were skipped one after the other, because they were not finite.
    """

    identity: dict[str, Any]
    step: Annotated[int, Field(ge=0)]
    phase: Annotated[list[int], Field(min_length=3, max_length=3)]
    sample_ids: np.ndarray
    probabilities: np.ndarray
    starts: NotRequired[np.ndarray]
    nonfinite: NotRequired[Annotated[int, Field(ge=0)]]
    hooks: list[dict[Any, Any]]
    client_state: dict[Any, Any]
    frozen: bool


NO_PHASE = [-1, 0, 0]


def identity(loop: Loop) -> dict[str, Any]:
    """What must be the same for a resume to go on with the same run."""
    run = loop.run
    return {
        **split_of(loop)._asdict(),
        "seed": run.seed,
        "pool": run.pool.fingerprint,
        "packing": None if run.packing is None else f"rows of {run.packing.capacity} tokens",
        "hooks": [hook.identity for hook in loop.hooks],
        "zero_stage": run.engine.zero_optimization_stage(),
    }


def split_of(loop: Loop) -> Split:
    run = loop.run
    return Split(run.micro_batch, run.accumulation, run.world_size, compared_by(loop.hooks))


def check_identity(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """UserError naming what of `identity` differs; how the global batch is split is `check_split`'s."""
    for key, value in now.items():
        if key not in Split._fields and saved.get(key) != value:
            raise UserError(
                f"{folder}: the checkpoint has {key} {_said(saved.get(key))}, this run has {_said(value)}; resume with "
                "the configuration that it was made with, or start in another output_dir"
            )


def _said(value: Any) -> str:
    return value if isinstance(value, str) and len(value) <= 80 else shown(value, 200)


def state_of(loop: Loop) -> dict[str, Any]:
    """`SavedState` but for what a checkpoint adds; where the plan is yet to be made it is empty, and phase NO_PHASE."""
    run, plan, phase = loop.run, loop.plan, NO_PHASE
    if plan is not None:
        planned = run.schedule.phases[loop.planned_phase]
        phase = [planned.index, planned.start, planned.steps]
    return {
        "identity": identity(loop),
        "step": run.step,
        "phase": phase,
        "sample_ids": np.empty(0, dtype=np.int64) if plan is None else plan.sample_ids,
        "probabilities": np.empty(0) if plan is None else plan.probabilities,
        **({} if plan is None or plan.starts is None else {"starts": plan.starts}),
        "nonfinite": loop.stepper.nonfinite.in_a_row,
        "hooks": [hook.state_dict() for hook in loop.hooks],
    }


def restore(loop: Loop, state: dict[str, Any]) -> None:
    run = loop.run
    if len(state["hooks"]) != len(loop.hooks):
        raise UserError(f"the checkpoint has the state of {len(state['hooks'])} hooks, this run has {len(loop.hooks)}")
    run.step = state["step"]
    loop.stepper.nonfinite.in_a_row = state.get("nonfinite", 0)
    for hook, saved in zip(loop.hooks, state["hooks"], strict=True):
        try:
            hook.load_state_dict(saved)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            what = f"{type(error).__name__}: {cut(str(error))}"
            raise UserError(f"the checkpoint's state does not fit {hook.identity} ({what})") from error
    if run.step >= run.total_steps:
        return
    phase = run.schedule.phase_at(run.step)
    if [phase.index, phase.start, phase.steps] == state["phase"]:
        loop.plan = Plan(state["sample_ids"], state["probabilities"], state.get("starts"))
        loop.planned_phase = phase.index
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
