"""What a stream's files are known by: a file changed in place is another stream, whatever its size and time say."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.config import Config
from dataflex.data.streams.stream_pool import load_streams
from dataflex.utils import files
from dataflex.utils.files import BLOCK, sample_digest
from tests.data.helpers import numbered
from tests.tiny import byte_tokenizer

Add = Callable[..., Path]
MakeConfig = Callable[..., Config]


def fingerprint(cfg: Config) -> str:
    return load_streams(cfg, byte_tokenizer()).fingerprint


def test_a_file_changed_in_place_is_another_stream(add: Add, config: MakeConfig) -> None:
    path = add("x", numbered(9))
    cfg = config("x", streaming=True)
    before, times, content = fingerprint(cfg), path.stat(), path.read_bytes()
    path.write_bytes(content.replace(b'"7"', b'"8"'))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size and fingerprint(cfg) != before
    path.write_bytes(content)
    os.utime(path, (1, 1))
    assert fingerprint(cfg) == before, "a copy of the same content is the same stream"


@pytest.mark.parametrize("place", [0, BLOCK - 1, 500 * BLOCK + 17, 1000 * BLOCK - 1])
def test_of_a_large_file_blocks_are_read(tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large"
    with path.open("wb") as handle:
        handle.truncate(1000 * BLOCK)
    read: list[Any] = []
    opened = Path.open
    monkeypatch.setattr(files, "sha256_of", lambda path: pytest.fail("all of it was read"))
    monkeypatch.setattr(Path, "open", lambda self, *a: read.append(self) or opened(self, *a))
    before = sample_digest(path, 3 * BLOCK)
    with opened(path, "r+b") as handle:
        handle.seek(place)
        handle.write(b"x")
    assert sample_digest(path, 3 * BLOCK) != before and read == [path, path]


def test_of_large_files_of_zeros_the_size_tells(tmp_path: Path) -> None:
    digests = set()
    for blocks in (8, 9, 12):
        path = tmp_path / str(blocks)
        path.write_bytes(bytes(blocks * BLOCK))
        digests.add(sample_digest(path, 3 * BLOCK))
    assert len(digests) == 3
