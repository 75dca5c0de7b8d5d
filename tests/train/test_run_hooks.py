"""Checkpoints that are no longer wanted: gone at once however the process ends, and nothing is left for good."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataflex.core.clock import Clock
from dataflex.engine import checkpoint
from dataflex.train.trainer.run_hooks import CheckpointHook, EvalHook
from dataflex.utils.files import finish_removals, remove
from dataflex.utils.stopping import Stop


class Killed(BaseException):
    pass


def make(folder: Path, step: int, *missing: str) -> Path:
    """What a checkpoint looks like, without the ``missing`` files."""
    place = folder / f"checkpoint-{step}"
    for name in {checkpoint.STATE, checkpoint.MANIFEST, "zero_pp_rank_0_optim_states.pt"} - set(missing):
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("x")
    return place


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def die_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal takes one file of the folder and then the process ends."""

    def half(path: Path) -> None:
        next(p for p in sorted(Path(path).rglob("*")) if p.is_file()).unlink()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", half)


def test_a_folder_whose_removal_was_ended_is_no_checkpoint_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, 3)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_halfway(patch)
        remove(tmp_path / "checkpoint-3")
    assert not list(tmp_path.glob("checkpoint-*")) and len(names(tmp_path)) == 1
    assert checkpoint.newest_whole_here(tmp_path) is None
    make(tmp_path, 3)
    remove(tmp_path / "checkpoint-3")
    assert not names(tmp_path), "a second removal takes what the first left"


def test_what_is_left_of_a_removal_goes_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 3)
    (tmp_path / "mine").write_text("kept")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_halfway(patch)
        remove(tmp_path / "checkpoint-3")
    finish_removals(tmp_path)
    assert names(tmp_path) == {"mine"}
    finish_removals(tmp_path / "not there")


def test_files_links_and_what_is_not_there_are_removed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("file", "link", "nothing"):
        remove(tmp_path / name)
    assert names(tmp_path) == {"kept"}


@pytest.mark.parametrize("keep", [None, 2])
def test_a_save_removes_what_it_makes_useless(keep: int | None, tmp_path: Path) -> None:
    """Whole ones beyond ``keep``, and ruins; not what another program put there, nor what is later than the save."""
    for step in (2, 4, 6):
        make(tmp_path, step)
    make(tmp_path, 3, checkpoint.MANIFEST)
    make(tmp_path, 5, checkpoint.MANIFEST, checkpoint.STATE)
    make(tmp_path, 9, checkpoint.MANIFEST)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_text("an export")
    (tmp_path / ".removing-checkpoint-0").mkdir()
    (tmp_path / "config.yaml").write_text("seed: 3")
    run: Any = SimpleNamespace(output_dir=tmp_path, step=8, total_steps=20, clock=Clock(), stop=Stop())
    run.engine = SimpleNamespace(save_checkpoint=lambda: make(tmp_path, 8))
    hook = CheckpointHook(4, keep, False, None)
    hook.on_train_start(run)
    (tmp_path / "config.yaml").unlink()  # what a checkpoint holds is what the run was made with
    hook.on_step_end(run, None)
    kept = {2, 4, 6, 8} if keep is None else {6, 8}
    assert names(tmp_path) == {f"checkpoint-{step}" for step in kept | {1, 9}}
    assert (tmp_path / "checkpoint-8/config.yaml").read_text() == "seed: 3"


def test_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (8, 9, 10):
        make(tmp_path, step)
    run: Any = SimpleNamespace(output_dir=tmp_path, step=11, total_steps=20, clock=Clock(), stop=Stop())
    run.engine = SimpleNamespace(save_checkpoint=lambda: make(tmp_path, 11))
    (tmp_path / "config.yaml").write_text("seed: 3")
    hook = CheckpointHook(11, 2, False, None)
    hook.on_train_start(run)
    hook.on_step_end(run, None)
    assert names(tmp_path) == {"config.yaml", "checkpoint-10", "checkpoint-11"}


@pytest.mark.parametrize(("start", "evaluated"), [(0, [0, 3, 6, 7]), (3, [6, 7]), (4, [6, 7])])
def test_evaluations_fall_before_the_first_step_every_so_often_and_after_the_last(
    start: int, evaluated: list[int]
) -> None:
    """A run that goes on does not evaluate again what it had evaluated when it was saved."""
    engine = SimpleNamespace(evaluate=lambda: {"eval_loss": 2.0})
    run: Any = SimpleNamespace(step=start, total_steps=7, engine=engine, clock=Clock())
    lines: list[dict[str, Any]] = []
    hook = EvalHook(3, SimpleNamespace(add=lambda run, entry: lines.append(entry)))  # type: ignore[arg-type]
    hook.on_train_start(run)
    while run.step < run.total_steps:
        run.step += 1
        hook.on_step_end(run, None)
    assert [line["current_steps"] for line in lines] == evaluated
    assert all(line == {"current_steps": line["current_steps"], "total_steps": 7, "eval_loss": 2.0} for line in lines)
