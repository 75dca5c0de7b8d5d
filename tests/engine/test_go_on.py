"""What a resume does to the folder: lines and decisions up to the checkpoint, of whatever content the files are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataflex.engine import checkpoint
from dataflex.engine.folder import run_folder
from dataflex.utils.errors import UserError
from tests.engine.test_manifest import make

GOOD = [b'{"step": 2, "a": 0.1, "name": "\\u00e4"}', b'{"step": 4,  "a": 1e-7}', b'{"step": 6}']


def run(step: int, total: int = 8) -> Any:
    return SimpleNamespace(step=step, total_steps=total)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A run that has gone on for six steps."""
    folder = tmp_path / "home"
    (folder / "decisions").mkdir(parents=True)
    for name in ("weights.jsonl", "odm_weights.jsonl"):
        (folder / name).write_bytes(b"\n".join(GOOD) + b"\n")
    for step in (2, 4, 10):
        for ending in ("json", "parquet"):
            (folder / "decisions" / f"step_{step}.{ending}").write_text(f"{step} {ending}")
    (folder / "trainer_log.jsonl").write_text("")
    (folder / run_folder.RESULTS).write_text("{}")
    for step in (4, 6):
        (folder / f"checkpoint-{step}").mkdir()
    return folder


def held(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


EXPECTED = {
    "decisions/step_2.json": b"2 json",
    "decisions/step_2.parquet": b"2 parquet",
    "odm_weights.jsonl": GOOD[0] + b"\n",
    "weights.jsonl": GOOD[0] + b"\n" + GOOD[1] + b"\n",
}


def test_what_came_after_the_checkpoint_goes_and_the_rest_stays_to_the_byte(home: Path) -> None:
    run_folder.go_on(home, home / "checkpoint-4", run(4))
    assert held(home) == EXPECTED | {"trainer_log.jsonl": b""}
    assert (home / "checkpoint-4").is_dir() and not (home / "checkpoint-6").exists()


def test_the_results_of_a_finished_run_stay(home: Path) -> None:
    run_folder.go_on(home, home / "checkpoint-6", run(6, total=6))
    assert (home / run_folder.RESULTS).exists()


def test_a_fork_gets_what_was_before_its_checkpoint_and_leaves_the_other_as_it_is(home: Path, tmp_path: Path) -> None:
    before = held(home)
    (tmp_path / "fork").mkdir()
    run_folder.go_on(tmp_path / "fork", home / "checkpoint-4", run(4))
    assert held(tmp_path / "fork") == EXPECTED and held(home) == before


def test_a_checkpoint_outside_of_a_run_is_said_to_have_nothing_before_it(tmp_path: Path, capsys: Any) -> None:
    for name in ("alone", "fork"):
        (tmp_path / name).mkdir()
    run_folder.go_on(tmp_path / "fork", tmp_path / "alone/checkpoint-4", run(4))
    said = capsys.readouterr().err
    assert f"{tmp_path / 'alone'} holds no run but checkpoints, so {tmp_path / 'fork'} lacks what was decided" in said
    (tmp_path / "alone/weights.jsonl").write_bytes(GOOD[0] + b"\n")
    run_folder.go_on(tmp_path / "fork", tmp_path / "alone/global_step4", run(0))
    assert not capsys.readouterr().err and held(tmp_path / "fork") == {}


def test_a_line_without_its_end_is_dropped(home: Path) -> None:
    (home / "weights.jsonl").write_bytes(GOOD[0] + b'\n{"step": 3')
    run_folder.go_on(home, home / "checkpoint-4", run(4))
    assert (home / "weights.jsonl").read_bytes() == GOOD[0] + b"\n"


DAMAGED = [
    b"\xff\xfe",
    b"{",
    b"[]",
    b"null",
    b"7",
    b"{}",
    b'{"step": "4"}',
    b'{"step": 4.5}',
    b'{"step": true}',
    b'{"step": null}',
    b"[" * 100_000,
    b"",
    b"\x00",
]


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: repr(line[:16]))
@pytest.mark.parametrize("name", ["weights.jsonl", "odm_weights.jsonl"])
def test_a_damaged_line_is_named_before_anything_of_the_run_goes(name: str, line: bytes, home: Path) -> None:
    (home / name).write_bytes(GOOD[0] + b"\n" + line + b"\n")
    before = held(home)
    with pytest.raises(UserError, match=f"home: line 2 of {name}.*; move the file away") as caught:
        run_folder.go_on(home, home / "checkpoint-6", run(6))
    assert "\n" not in str(caught.value) and held(home) == before


def test_a_step_of_any_size_is_read(home: Path) -> None:
    (home / "weights.jsonl").write_bytes(b'{"step": -1}\n{"step": 1' + b"0" * 40 + b"}\n")
    run_folder.go_on(home, home / "checkpoint-6", run(6))
    assert (home / "weights.jsonl").read_bytes() == b'{"step": -1}\n'


POINTERS = {
    "above": b"../secret",
    "the folder above": b"..",
    "the folder": b".",
    "absolute": b"{secret}",
    "deeper": b"whole/inner",
    "bytes": b"\xff\xfe\x00",
    "a zero": b"whole\x00",
    "nothing": b"",
    "two lines": b"whole\nsecret",
    "long": b"x" * 100_000,
    "not there": b"checkpoint-9",
    "a file": b"latest",
}


@pytest.mark.parametrize("name", POINTERS)
def test_a_pointer_that_names_nothing_in_its_folder_is_passed_over(name: str, tmp_path: Path, capsys: Any) -> None:
    """The checkpoint beside the folder is never taken, the whole one in it is."""
    place = tmp_path / "run"
    make(tmp_path / "secret", 9)
    make(place / "whole", 4)
    make(place / "whole/inner", 9)
    text = POINTERS[name].replace(b"{secret}", str(tmp_path / "secret").encode())
    (place / checkpoint.POINTER).write_bytes(text)
    assert checkpoint.latest(place) == place / "whole"
    if name != "a file":
        assert "latest: names nothing in its folder, passed over" in capsys.readouterr().err
        assert checkpoint.pointed_to(place) is None
    (place / checkpoint.POINTER).write_text("whole\n")
    assert checkpoint.pointed_to(place) == place / "whole"


def test_a_pointer_that_is_a_folder_is_passed_over(tmp_path: Path) -> None:
    make(tmp_path / "whole", 4)
    (tmp_path / checkpoint.POINTER).mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "whole"


def test_a_folder_of_checkpoints_is_named_with_its_newest(tmp_path: Path) -> None:
    make(tmp_path / "run/whole", 4)
    for text, hint in ((b"whole", r" \(the newest is whole\)"), (b"\xff", ""), (b"../x", "")):
        (tmp_path / "run/latest").write_bytes(text)
        cfg: Any = SimpleNamespace(output=SimpleNamespace(overwrite_output_dir=False))
        with pytest.raises(UserError, match=f"a folder of checkpoints; name one in it{hint}$"):
            run_folder._named(cfg, tmp_path / "run", tmp_path / "new")
