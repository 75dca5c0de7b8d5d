"""Ten and more checkpoints: which stay, which is the newest, and in which order their numbers are taken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataflex.core.clock import Clock
from dataflex.engine import checkpoint
from dataflex.engine.checkpoint.manifest import random_state_file
from dataflex.engine.folder.own_files import CONFIG
from dataflex.train.trainer.run_hooks import CheckpointHook
from dataflex.utils.files import write_atomically
from dataflex.utils.records import FileRecord, write_sealed
from dataflex.utils.stopping import Stop


def whole(folder: Path, step: int, world_size: int = 1) -> Path:
    """A checkpoint without weights: only what makes it count."""
    folder.mkdir(exist_ok=True)
    names = [checkpoint.STATE, *(random_state_file(rank) for rank in range(world_size))]
    for name in names:
        (folder / name).write_text(f"{step}")
    files = {name: FileRecord.of(folder / name) for name in names}
    content = checkpoint.Manifest(step=step, world_size=world_size, dataflex="1", files=files)
    write_sealed(folder / checkpoint.MANIFEST, content.model_dump())
    write_atomically(folder.parent / checkpoint.POINTER, folder.name)
    return folder


def trained(out: Path, every: int, keep: int | None, steps: int, only_model: bool = False) -> list[list[int]]:
    """The steps whose checkpoints are there after each save of a run of ``steps``."""
    (out / CONFIG).write_text("model_name_or_path: x\n")
    run: Any = SimpleNamespace(step=0, total_steps=steps, output_dir=out, clock=Clock(), stop=Stop())
    run.engine = SimpleNamespace(save_checkpoint=lambda: whole(out / f"checkpoint-{run.step}", run.step))
    hook = CheckpointHook(every, keep, only_model, None)  # type: ignore[arg-type]
    hook.on_train_start(run)
    seen = []
    for step in range(1, steps + 1):
        run.step = step
        hook.on_step_end(run, None)
        if step % every == 0 or step == steps:
            seen.append(sorted(checkpoint.step_of(p) for p in out.glob("checkpoint-*")))
    return seen


@pytest.mark.parametrize("keep", [1, 2, 3, 11, None])
def test_the_newest_stay(tmp_path: Path, keep: int | None) -> None:
    """Over the changes from one digit to two and from two to three."""
    saved = [*range(3, 103, 3), 103]
    for number, left in enumerate(trained(tmp_path, 3, keep, 103), start=1):
        assert left == saved[max(0, number - (keep or number)) : number]
    assert checkpoint.newest_whole(tmp_path) == checkpoint.latest(tmp_path) == tmp_path / "checkpoint-103"


@pytest.mark.parametrize("steps", [(9, 10, 100), (100, 10, 9), (10, 9, 8), (99, 100, 1000), tuple(range(1, 13))])
def test_numbers_count_and_not_letters(tmp_path: Path, steps: tuple[int, ...]) -> None:
    for step in steps:
        whole(tmp_path / f"checkpoint-{step}", step)
    left = sorted(steps)
    while left:
        newest = tmp_path / f"checkpoint-{left.pop()}"
        assert checkpoint.newest_whole(tmp_path) == newest
        (newest / checkpoint.STATE).write_text("damaged")
    assert checkpoint.newest_whole(tmp_path) is None


def test_where_the_newest_is_damaged_the_pointer_leads_to_the_next(tmp_path: Path) -> None:
    for step in range(1, 13):
        whole(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-12" / checkpoint.STATE).write_text("damaged")
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-11"
    write_atomically(tmp_path / checkpoint.POINTER, "checkpoint-9")
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-9", "what the pointer names is whole"


def test_a_folder_of_any_name_counts_by_the_steps_of_its_manifest(tmp_path: Path) -> None:
    whole(tmp_path / "checkpoint-9", 9)
    whole(tmp_path / "final", 10)
    whole(tmp_path / "after-2", 100)
    assert checkpoint.newest_whole(tmp_path) == tmp_path / "after-2"
    assert [checkpoint.saved_step(tmp_path / n) for n in ("checkpoint-9", "final", "after-2")] == [9, 10, 100]


def test_every_ranks_random_state_must_be_there(tmp_path: Path) -> None:
    """Twelve processes, whose files a listing by name has in the order 0, 1, 10, 11, 2."""
    folder = whole(tmp_path / "checkpoint-1", 1, world_size=12)
    assert checkpoint.broken(folder) is None
    (folder / random_state_file(10)).unlink()
    assert "dataflex_random_rank10.pt is missing" in str(checkpoint.broken(folder))
