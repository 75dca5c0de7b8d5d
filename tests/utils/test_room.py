"""What is said where a disk is full, whatever was being written, and by whichever library."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from dataflex.utils import room
from dataflex.utils.errors import UserError
from dataflex.utils.files import write_atomically
from dataflex.utils.room import check_room, full_disk_said


def by_a_library() -> None:
    raise RuntimeError("I/O error: No space left on device (os error 28)")


def wrapped() -> None:
    try:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    except OSError as exc:
        raise ValueError("the writer failed") from exc


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_log_on_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, full_disk_said({"output_dir": str(tmp_path)}):
        Path("/dev/full").write_text("a line")
    assert re.fullmatch(
        r"output_dir: the disk at /\S* is full, [\d,]+ MiB are free \(\[Errno 28\] No space left on device\); make "
        "room: the same command goes on from the last whole checkpoint",
        str(caught.value),
    )


@pytest.mark.parametrize("write", [by_a_library, wrapped])
def test_the_fullest_of_the_disks_is_named_where_the_error_names_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[], None]
) -> None:
    (tmp_path / "tight").mkdir()
    left = {"wide": 5 << 30, "tight": 3 << 20}
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=left.get(path.name, 9 << 30)))
    places = {"output_dir": str(tmp_path / "wide"), "HF_DATASETS_CACHE": str(tmp_path / "tight"), "features_dir": ""}
    with pytest.raises(UserError, match=r"^HF_DATASETS_CACHE: the disk at .* is full, 3 "), full_disk_said(places):
        write()


def test_a_file_that_the_error_names_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr("dataflex.utils.files.os.replace", full)
    file = tmp_path / "trainer_state.json"
    with pytest.raises(UserError, match=rf"^{file}: the disk at "), full_disk_said({"output_dir": "/"}):
        write_atomically(file, "{}")


def test_other_errors_pass_as_they_are() -> None:
    for error in (OSError(errno.EACCES, "no"), UserError("output_dir: No space left on device"), KeyError("x")):
        with pytest.raises(type(error)) as caught, full_disk_said({"output_dir": "/"}):
            raise error
        assert caught.value is error


def test_every_command_of_the_driver_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataflex import driver
    from dataflex.config import load_config

    def full(cfg: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("_be_quiet", "_start_process_group", "check_possible"):
        monkeypatch.setattr(driver, name, lambda *_: None)
    keys = {"model_name_or_path": "m", "dataset": ["a"], "output_dir": str(tmp_path)}
    for command in driver.COMMANDS:
        monkeypatch.setitem(driver.COMMANDS, command, full)
        with pytest.raises(UserError, match="the disk at .* is full"):
            driver.run(load_config(keys, quiet=True), command)


def test_room_for_what_is_wanted_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 << 20))
    check_room(tmp_path, 3 << 20, "a checkpoint")
    with pytest.raises(UserError, match="it takes about 4 MiB, the disk at .* has 3 MiB free"):
        check_room(tmp_path, (3 << 20) + 1, "a checkpoint")
