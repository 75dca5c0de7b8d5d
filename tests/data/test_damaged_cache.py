"""What is kept is checked before it is mapped: a damaged cache is made anew aloud, a damaged tokenized_path refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.config import Config
from dataflex.data import cache
from dataflex.data.cache import MANIFEST
from dataflex.utils.errors import UserError
from tests.data.helpers import load, numbered, prompts
from tests.tiny import byte_tokenizer

Add = Callable[..., Path]
MakeConfig = Callable[..., Config]


def flip_an_id(folder: Path) -> None:
    """Change one token id, inside of the rows' buffer, so that every length and offset stays right."""
    path = next(folder.glob("*.arrow"))
    data = bytearray(path.read_bytes())
    ids = byte_tokenizer()("Human", add_special_tokens=False)["input_ids"]
    data[data.index(np.array(ids, dtype=np.int32).tobytes())] ^= 1
    path.write_bytes(data)


def cut_short(folder: Path) -> None:
    path = next(folder.glob("*.arrow"))
    os.truncate(path, path.stat().st_size // 2)


def lose(folder: Path) -> None:
    next(folder.glob("*.arrow")).unlink()


def break_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


DAMAGE = {"flipped": flip_an_id, "cut short": cut_short, "lost": lose, "no manifest": break_manifest}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_cache_is_made_anew_aloud(
    add: Add, config: MakeConfig, private_cache: Path, how: str, capsys: Any
) -> None:
    add("x", numbered(20))
    load(config("x"))
    entries = sorted((private_cache / "dataflex").iterdir())
    assert len(entries) == 2, "the rows, and their tokens"
    for entry in entries:
        if how == "flipped" and b"input_ids" not in next(entry.glob("*.arrow")).read_bytes():
            continue
        DAMAGE[how](entry)
    capsys.readouterr()
    again = load(config("x")).train
    assert "the cache is made anew: " in capsys.readouterr().err
    assert prompts(again) == [str(i) for i in range(20)]
    load(config("x"))
    assert "made anew" not in capsys.readouterr().err


@pytest.mark.parametrize("how", ["flipped", "cut short", "lost"])
def test_a_damaged_tokenized_path_is_refused(add: Add, config: MakeConfig, tmp_path: Path, how: str) -> None:
    add("x", numbered(20))
    keys = {"tokenized_path": str(tmp_path / "tokens")}
    load(config("x", **keys))
    DAMAGE[how](tmp_path / "tokens" / "x")
    with pytest.raises(
        UserError, match=r"tokens/x is damaged: 00000.arrow .*set overwrite_cache: true to make it anew$"
    ):
        load(config("x", **keys))
    assert prompts(load(config("x", **keys, overwrite_cache=True)).train) == [str(i) for i in range(20)]


def test_a_process_that_is_killed_leaves_nothing_that_counts(add: Add, config: MakeConfig, private_cache: Path) -> None:
    add("x", numbered(3))
    load(config("x"))
    entry = next(p for p in (private_cache / "dataflex").iterdir())
    left = entry.with_name(f".{entry.name}-abc")
    shutil.copytree(entry, left)
    shutil.rmtree(entry)
    os.utime(left, (1, 1))
    load(config("x"))
    assert entry.is_dir() and not left.exists(), "what was left a day ago and more is cleared away"


def test_a_cache_that_cannot_be_written_is_one_line(
    add: Add, config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    add("x", numbered(3))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        UserError, match=r"file/cache/dataflex: the cache cannot be written: Not a dir.*set HF_DATASETS_CACHE"
    ):
        load(config("x"))


def test_what_another_process_has_made_meanwhile_stays(
    add: Add, config: MakeConfig, private_cache: Path, tmp_path: Path
) -> None:
    """Two runs that start at once make the same entry: the second one does not take it from under the first."""
    add("x", numbered(3))
    load(config("x"))
    entry = next(p for p in (private_cache / "dataflex").iterdir())
    fingerprint, others = cache.read_entry(entry).fingerprint, tmp_path / "others"
    entry.rename(others)
    seen = others.stat().st_ino

    def make(work: Path) -> Any:
        dataset = cache.opened(shutil.copytree(others, work / "mine"), cache.read_entry(others))
        others.rename(entry)
        return dataset

    assert len(cache.store(entry, make, fingerprint)) == 3
    assert entry.stat().st_ino == seen
