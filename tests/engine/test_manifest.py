"""Which checkpoint is the newest whole one, whatever happened to a manifest; without an engine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from dataflex.engine import checkpoint
from dataflex.engine.checkpoint.loading import read_state
from dataflex.engine.checkpoint.manifest import random_state_file
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger
from dataflex.utils.records import FileRecord, write_sealed
from tests.faults import bit_flips

FLIPS = 600


def make(folder: Path, step: int, **content: bytes) -> Path:
    """A folder that counts as a checkpoint of ``step``."""
    folder.mkdir(parents=True)
    for name, data in {checkpoint.STATE: b"state", random_state_file(0): b"random", **content}.items():
        (folder / name).write_bytes(data)
    files = {path.name: FileRecord.of(path) for path in folder.iterdir()}
    manifest = checkpoint.Manifest(step=step, world_size=1, dataflex="0", files=files)
    write_sealed(folder / checkpoint.MANIFEST, manifest.model_dump())
    return folder


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "level", logging.CRITICAL)


@pytest.mark.parametrize("name", ["best", "epoch-1", "checkpoint-3"])
def test_the_step_is_the_manifests_not_the_names(tmp_path: Path, name: str) -> None:
    make(tmp_path / "checkpoint-21", 21)
    newest = make(tmp_path / name, 24)
    assert checkpoint.newest_whole(tmp_path) == newest
    assert (checkpoint.saved_step(newest), checkpoint.saved_step(tmp_path / "checkpoint-99")) == (24, 99)


@pytest.mark.parametrize("name", ["first", "last"])
def test_every_file_is_compared_with_the_manifest(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "checkpoint-3", 3)
    assert checkpoint.broken(folder) is None
    files = sorted(path.name for path in folder.iterdir() if path.name != checkpoint.MANIFEST)
    damaged = files[0 if name == "first" else -1]
    (folder / damaged).write_bytes(b"xxxxx")
    assert len(files) > 1 and damaged in str(checkpoint.broken(folder))


def test_a_whole_checkpoint_that_is_being_removed_does_not_count(tmp_path: Path) -> None:
    older = make(tmp_path / "checkpoint-3", 3)
    make(tmp_path / "checkpoint-6", 6).rename(tmp_path / ".removing-checkpoint-6")
    assert checkpoint.newest_whole(tmp_path) == older


def flipped_manifests(folder: Path, most: int | None) -> int:
    """Flip bits in the newest of two manifests; how many of the flips were not harmless."""
    make(folder / "checkpoint-2", 2)
    newest = make(folder / "checkpoint-4", 4)
    seen = 0
    for _ in bit_flips(newest / checkpoint.MANIFEST, most):
        found = checkpoint.newest_whole_here(folder)
        assert found is not None, "the last good one was not found"
        seen += found.name == "checkpoint-2"
        manifest = checkpoint.read_manifest(newest)
        assert isinstance(manifest, str) == (found != newest)
        if found == newest:
            assert checkpoint.saved_step(newest) == 4
    return seen


def test_a_flipped_bit_in_a_manifest_gives_the_last_good_checkpoint(tmp_path: Path, quiet: None) -> None:
    assert flipped_manifests(tmp_path, FLIPS) > 0.99 * FLIPS


@pytest.mark.slow
def test_every_bit_of_a_manifest(tmp_path: Path, quiet: None) -> None:
    seen = flipped_manifests(tmp_path, None)
    assert seen > 0.99 * 8 * (tmp_path / "checkpoint-4" / checkpoint.MANIFEST).stat().st_size


def test_a_manifest_that_names_too_little_is_broken(tmp_path: Path) -> None:
    folder = make(tmp_path / "checkpoint-4", 4)
    manifest = checkpoint.read_manifest(folder)
    assert isinstance(manifest, checkpoint.Manifest)
    content = manifest.model_dump()
    write_sealed(folder / checkpoint.MANIFEST, content | {"files": {}})
    assert checkpoint.broken(folder) == f"{checkpoint.MANIFEST} does not name {random_state_file(0)}"
    write_sealed(folder / checkpoint.MANIFEST, content | {"world_size": 2})
    assert checkpoint.broken(folder) == f"{checkpoint.MANIFEST} does not name {random_state_file(1)}"


GOOD = {
    "identity": {"seed": 1},
    "step": 4,
    "phase": [0, 0, 8],
    "sample_ids": {"__array__": torch.arange(8)},
    "probabilities": {"__array__": torch.ones(8)},
    "hooks": [{}],
    "client_state": {},
    "frozen": False,
}
BAD: dict[str, Any] = {
    "nothing": None,
    "a key too few": {key: value for key, value in GOOD.items() if key != "identity"},
    "text for a step": GOOD | {"step": "4"},
    "a list for an array": GOOD | {"sample_ids": [0, 1]},
    "a marker without an array": GOOD | {"sample_ids": {"__array__": 3}},
    "a phase of two": GOOD | {"phase": [0, 0]},
    "a negative step": GOOD | {"step": -1},
}


def test_a_state_comes_back(tmp_path: Path) -> None:
    torch.save(GOOD, tmp_path / checkpoint.STATE)
    state = read_state(tmp_path)
    assert state["step"] == 4 and state["sample_ids"].tolist() == list(range(8))


@pytest.mark.parametrize("case", BAD)
def test_a_state_of_any_content_is_told_in_one_line(tmp_path: Path, case: str) -> None:
    torch.save(BAD[case], tmp_path / checkpoint.STATE)
    with pytest.raises(UserError, match=rf"{checkpoint.STATE}.*[^\n]$"):
        read_state(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04\x95", b"cos\nsystem\n(S'touch planted'\ntR."])
def test_a_state_that_is_no_file_of_torch_is_told_and_not_run(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / checkpoint.STATE).write_bytes(content)
    with pytest.raises(UserError, match=f"{checkpoint.STATE}: cannot be read"):
        read_state(tmp_path)
    assert not (tmp_path / "planted").exists()
