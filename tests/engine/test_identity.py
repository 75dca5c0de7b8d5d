"""Every field of a checkpoint's identity: another value is refused before anything is loaded, and named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.core.plan import Plan, epoch_schedule
from dataflex.engine import checkpoint
from dataflex.engine.checkpoint import loading
from dataflex.engine.checkpoint.state import identity, state_of
from dataflex.engine.steps.skip import NonFinite
from dataflex.utils.errors import UserError
from dataflex.utils.records import FileRecord, write_sealed
from tests.engine.test_many_checkpoints import whole

USUAL: dict[str, Any] = {
    "micro_batch": 2,
    "accumulation": 3,
    "world_size": 4,
    "seed": 5,
    "pool": "one",
    "stage": 2,
    "packing": None,
    "hooks": ("Planner a", "Hook b"),
    "compared": "",
}
# Of each field of the identity: the changes of `USUAL`, and what the refusal says of it.
CHANGES: dict[str, list[tuple[dict[str, Any], str]]] = {
    "micro_batch": [({"micro_batch": 1}, "a global batch of 2 x 3 x 4 = 24 samples .* this run has 1 x 3 x 4 = 12")],
    "gradient_accumulation": [({"accumulation": 2}, "a global batch of 2 x 3 x 4 = 24 .* this run has 2 x 2 x 4 = 16")],
    "world_size": [({"world_size": 3}, "a global batch of 2 x 3 x 4 = 24 samples .* this run has 2 x 3 x 3 = 18")],
    "compared": [
        (
            {"compared": "micro-batch", "micro_batch": 3, "accumulation": 2},
            "its weighting compares the samples of a micro-batch, which has 2 samples in the checkpoint and 3 in this",
        ),
        (
            {"compared": "global micro-batch", "accumulation": 6, "world_size": 2},
            "compares the samples of a global micro-batch, which has 8 samples in the checkpoint and 4 in this run",
        ),
    ],
    "seed": [({"seed": 6}, "the checkpoint has seed 5, this run has 6; resume with the configuration")],
    "pool": [({"pool": "two"}, "the checkpoint has pool one, this run has two")],
    "packing": [
        (
            {"packing": SimpleNamespace(capacity=128)},
            "the checkpoint has packing None, this run has rows of 128 tokens",
        )
    ],
    "zero_stage": [({"stage": 3}, "the checkpoint has zero_stage 2, this run has 3")],
    "hooks": [
        (
            {"hooks": ("Planner a",)},
            r"the checkpoint has hooks \['Planner a', 'Hook b'\], this run has \['Planner a'\]",
        ),
        ({"hooks": ("Planner a", "Hook c")}, r"this run has \['Planner a', 'Hook c'\]"),
        ({"hooks": ("Hook b", "Planner a")}, r"this run has \['Hook b', 'Planner a'\]"),
    ],
}
# The same global batch in another split, where nothing compares samples.
ALIKE: list[dict[str, Any]] = [
    {},
    {"micro_batch": 3, "accumulation": 2},
    {"accumulation": 6, "world_size": 2},
    {"micro_batch": 1, "accumulation": 6},
    {"compared": "global micro-batch", "micro_batch": 4, "world_size": 2},
]


def loop_of(**changes: Any) -> Any:
    now = USUAL | changes
    run = SimpleNamespace(
        **{name: now[name] for name in ("micro_batch", "accumulation", "world_size", "seed")},
        step=2,
        total_steps=6,
        rank=0,
        schedule=epoch_schedule(6, 6),
        pool=SimpleNamespace(fingerprint=now["pool"]),
        packing=now["packing"],
        engine=SimpleNamespace(zero_optimization_stage=lambda: now["stage"]),
    )
    state: dict[str, Any] = {"state_dict": lambda: {}, "load_state_dict": lambda saved: None}
    hooks = [SimpleNamespace(identity=name, compared=now["compared"], **state) for name in now["hooks"]]
    return SimpleNamespace(
        run=run,
        hooks=hooks,
        plan=Plan(np.arange(4), np.ones(4)),
        planned_phase=0,
        planner=SimpleNamespace(decides=True),
        stepper=SimpleNamespace(nonfinite=NonFinite()),
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The checkpoint of the usual run, without DeepSpeed's files."""
    folder = whole(tmp_path / "checkpoint-2", 2, world_size=4)
    state = checkpoint.encode(state_of(loop_of()) | {"client_state": {}, "frozen": False})
    torch.save(state, folder / checkpoint.STATE)
    return whole_again(folder)


def whole_again(folder: Path) -> Path:
    """A manifest that fits what lies there now."""
    files = {p.name: FileRecord.of(p) for p in folder.iterdir() if p.name != checkpoint.MANIFEST}
    write_sealed(
        folder / checkpoint.MANIFEST, checkpoint.Manifest(step=2, world_size=4, dataflex="1", files=files).model_dump()
    )
    return folder


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What came as far as DeepSpeed's own loading."""
    folders: list[Path] = []
    monkeypatch.setattr(loading, "load_deepspeed", lambda engine, folder, **how: (folders.append(folder), {})[::-1])
    monkeypatch.setattr(loading, "_restore_random_state", lambda *_: None)
    return folders


@pytest.mark.parametrize("field", CHANGES)
def test_another_value_is_refused_and_named(field: str, saved: Path, loaded: list[Path]) -> None:
    for changes, text in CHANGES[field]:
        loop = loop_of(**changes)
        assert identity(loop)[field] != identity(loop_of())[field]
        with pytest.raises(UserError, match=text):
            checkpoint.load(loop.run.engine, loop, saved)
    assert not loaded


@pytest.mark.parametrize("changes", ALIKE)
def test_the_same_run_in_another_split_goes_on(changes: dict[str, Any], saved: Path, loaded: list[Path]) -> None:
    loop = loop_of(**changes)
    checkpoint.load(loop.run.engine, loop, saved)
    assert loaded == [saved] and loop.run.step == 2


def test_weights_alone_ask_for_the_same_zero_stage_only(saved: Path, loaded: list[Path]) -> None:
    for rows in CHANGES.values():
        for changes, _ in rows:
            loop = loop_of(**changes)
            if "stage" in changes:
                with pytest.raises(UserError, match="the checkpoint has zero_stage 2, this run has 3"):
                    checkpoint.load(loop.run.engine, loop, saved, load_module_only=True)
                with pytest.raises(UserError, match="the checkpoint has zero_stage 2, this run has 3"):
                    checkpoint.load_weights(loop.run.engine, saved)
            else:
                checkpoint.load(loop.run.engine, loop, saved, load_module_only=True)
                assert checkpoint.load_weights(loop.run.engine, saved) == 2


def test_every_field_of_the_identity_has_a_row() -> None:
    assert set(CHANGES) == set(identity(loop_of())), "add a row to CHANGES"


@pytest.mark.parametrize("field", ["micro_batch", "gradient_accumulation", "world_size"])
@pytest.mark.parametrize("value", [None, 0, "2"])
def test_a_split_that_is_none_is_refused(field: str, value: Any, saved: Path, loaded: list[Path]) -> None:
    state = checkpoint.encode(state_of(loop_of()) | {"client_state": {}, "frozen": False})
    state["identity"][field] = value
    torch.save(state, saved / checkpoint.STATE)
    loop = loop_of()
    with pytest.raises(UserError, match=f"the checkpoint has {field} .*, expected a whole number >= 1"):
        checkpoint.load(loop.run.engine, loop, whole_again(saved))
    assert not loaded
