"""What a checkpoint keeps of hooks and components: any state of plain values survives, nothing else is saved."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.core.hook import Hook, Planner
from dataflex.core.packing import Packing
from dataflex.core.plan import Plan, epoch_schedule
from dataflex.engine import checkpoint
from dataflex.engine.checkpoint.state import check_identity, random_state, restore, set_random_state, state_of
from dataflex.engine.steps.loop import Loop
from dataflex.engine.steps.skip import NonFinite
from dataflex.utils.errors import UserError

STATE: dict[str, Any] = {
    "int": np.arange(5),
    "float": np.linspace(0, 1, 6).reshape(2, 3),
    "empty": np.empty((0, 4), dtype=np.float32),
    "scalar array": np.array(2.5),
    "numpy scalars": [np.int64(3), np.float32(0.5), np.bool_(True)],
    "unsigned": np.arange(4, dtype=np.uint32),
    "mask": np.array([True, False]),
    "reversed": np.arange(4)[::-1],
    "tensor": torch.arange(3.0),
    "plain": {"a": [1, 2.5, "x", None, True, b"raw"], "b": (1, ("y",)), 3: "int key"},
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(a, b)
    if torch.is_tensor(a):
        return torch.is_tensor(b) and torch.equal(a, b)
    return bool(a == b)


@pytest.mark.parametrize("key", STATE)
def test_states_survive_a_file_that_loads_without_code(key: str, tmp_path: Path) -> None:
    value = {key: STATE[key]}
    torch.save(checkpoint.encode(value), tmp_path / "state.pt")
    assert same(value, checkpoint.decode(torch.load(tmp_path / "state.pt", weights_only=True)))


@pytest.mark.parametrize(
    "value", [np.int64(2**53 + 1), np.float32(0.5), np.bool_(True)], ids=lambda v: type(v).__name__
)
def test_a_number_of_numpy_comes_back_as_pythons(value: Any) -> None:
    assert checkpoint.encode(value) == value and type(checkpoint.encode(value)) in (int, float, bool)
    assert type(checkpoint.encode(value)) is type(value.item())


def test_read_only_arrays_are_saved(tmp_path: Path) -> None:
    frozen = np.arange(3)
    frozen.flags.writeable = False
    assert checkpoint.decode(checkpoint.encode(frozen)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [Path("x"), {1, 2}, object(), np.array(["text"]), torch.nn.Linear(1, 1)])
def test_what_would_not_load_is_refused_when_saved(value: Any) -> None:
    with pytest.raises(UserError, match=rf"checkpoint: cannot save a {type(value).__name__} \(in hooks.0.mine\)"):
        checkpoint.encode({"hooks": [{"mine": value}]})


def test_every_random_state_comes_back() -> None:
    def drawn() -> list[float]:
        return [random.random(), float(np.random.random()), float(torch.rand(()))]

    before = checkpoint.decode(checkpoint.encode(random_state()))
    wanted = drawn()
    assert all(a != b for a, b in zip(wanted, drawn(), strict=True))
    set_random_state(before)
    assert drawn() == wanted


class Counting(Planner):
    """decides: so that a resume needs the phase's own plan."""

    def __init__(self) -> None:
        self.count = 0

    def plan(self, run: Any, phase: Any) -> Plan:
        raise AssertionError("a resumed phase has its plan")

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def loop_at(step: int) -> Loop:
    """Of two phases of four steps, on an engine of ZeRO-2 that is not asked for anything else."""
    run: Any = SimpleNamespace(
        schedule=epoch_schedule(8, 4), seed=5, micro_batch=2, accumulation=3, world_size=4, step=step, total_steps=8,
        pool=SimpleNamespace(fingerprint="f00d"), packing=Packing(np.full(9, 2), 6),
        engine=SimpleNamespace(zero_optimization_stage=lambda: 2),
    )  # fmt: skip
    stepper: Any = SimpleNamespace(nonfinite=NonFinite("skip"))
    return Loop(run, [Counting(), Hook()], None, stepper)  # type: ignore[arg-type]


def test_the_state_of_a_run_by_hand_and_back() -> None:
    loop = loop_at(step=6)
    rows = np.array([0, 1, 4])
    loop.plan, loop.planned_phase = Plan(np.arange(5, 9), np.array([0.1, 0.2, 0.3, 0.4]), rows), 1
    loop.planner.count = 3  # type: ignore[attr-defined]
    loop.stepper.nonfinite.in_a_row = 2
    state = state_of(loop)
    assert state["identity"] == {
        "micro_batch": 2,
        "gradient_accumulation": 3,
        "world_size": 4,
        "compared": "",
        "seed": 5,
        "pool": "f00d",
        "packing": "rows of 6 tokens",
        "hooks": ["Counting", "Hook"],
        "zero_stage": 2,
    }
    assert (state["step"], state["phase"], state["hooks"]) == (6, [1, 4, 4], [{"count": 3}, {}])
    assert state["nonfinite"] == 2
    fresh = loop_at(step=0)
    restore(fresh, checkpoint.decode(checkpoint.encode(state)))
    assert fresh.stepper.nonfinite.in_a_row == 2
    assert same(state_of(fresh), state) and state["starts"].tolist() == [0, 1, 4]
    loop.plan, loop.run.packing = Plan(np.arange(5, 9), np.ones(4)), None
    plain = state_of(loop)
    assert plain["identity"]["packing"] is None and "starts" not in plain
    with pytest.raises(UserError, match="the checkpoint has packing None, this run has rows of 6 tokens"):
        check_identity(plain["identity"], state["identity"], Path("c"))
    with pytest.raises(UserError, match="the checkpoint is at step 6, inside a phase of 3 steps from step 5"):
        restore(loop_at(step=0), state | {"phase": [1, 5, 3]})
    with pytest.raises(UserError, match="a phase of 3 steps from step 4; this run's schedule has 4 from 4 there"):
        restore(loop_at(step=0), state | {"phase": [1, 4, 3]})


def test_a_checkpoint_that_counted_no_steps_that_are_not_finite_begins_the_count() -> None:
    state = state_of(loop_at(step=6))
    del state["nonfinite"]
    fresh = loop_at(step=0)
    fresh.planner.decides = False
    fresh.stepper.nonfinite.in_a_row = 2
    restore(fresh, state)
    assert fresh.run.step == 6 and fresh.stepper.nonfinite.in_a_row == 0
