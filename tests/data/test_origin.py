"""Where a sample was read: its file and its row there, whatever was dropped, chosen or held out on the way."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dataflex.config import Config
from dataflex.data.pool import Pool
from dataflex.data.sources.source import digests_of
from tests.data.helpers import load, numbered, prompts

Add = Callable[..., Path]
MakeConfig = Callable[..., Config]


def places(pool: Pool) -> list[tuple[str, int]]:
    """(file, row) of each sample."""
    assert pool.origins is not None and pool.rows is not None
    found = []
    for domain, row in zip(pool.domain_ids, pool.rows, strict=True):
        origin = pool.origins[domain]
        assert origin is not None
        files, rows = origin.places(np.array([row]))
        found.append((origin.names[int(files[0])], int(rows[0])))
    return found


@pytest.fixture
def two(add: Add, data_dir: Path) -> None:
    """`many` in three files of 6, 5 and 1 rows, of which some cannot be used, with blank lines; `one` in a file."""
    rows = [{"instruction": f"m{i}", "output": None if i in (1, 7) else str(i)} for i in range(12)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (data_dir / "many").mkdir()
    for name, part in (("a.jsonl", lines[:6]), ("b.jsonl", ["\n", *lines[6:11]]), ("c.jsonl", lines[11:])):
        (data_dir / "many" / name).write_text("\n".join(part))
    add("one", numbered(4, "n"))
    info = json.loads((data_dir / "dataset_info.json").read_text())
    (data_dir / "dataset_info.json").write_text(json.dumps(info | {"many": {"file_name": "many"}}))


def of_prompt(prompt: str) -> tuple[str, int]:
    number = int(prompt[1:])
    if prompt[0] == "n":
        return "one.json", number
    return ("a.jsonl", number) if number < 6 else ("b.jsonl", number - 6) if number < 11 else ("c.jsonl", 0)


@pytest.mark.parametrize("keys", [{}, {"max_samples": 8}, {"val_size": 4}], ids=str)
def test_each_sample_knows_its_row(two: None, config: MakeConfig, keys: dict[str, int]) -> None:
    out = load(config("many", "one", **keys))
    for pool in (out.train, out.eval):
        if pool is not None:
            assert isinstance(pool, Pool)
            rows = [of_prompt(prompt) for prompt in prompts(pool)]
            assert places(pool) == rows
            assert [pool.whence(i) for i in range(len(pool))] == [f"{name}:{row + 1}" for name, row in rows]
    assert ("a.jsonl", 2) in places(out.train) + (places(out.eval) if out.eval else [])


def test_a_file_that_changes_has_another_digest(add: Add, config: MakeConfig) -> None:
    digests = []
    for rows in (numbered(3), numbered(3), [*numbered(2), {"instruction": "2", "output": "two"}]):
        add("x", rows)
        pool = load(config("x")).train
        assert isinstance(pool, Pool) and pool.origins is not None and pool.origins[0] is not None
        digests.append(pool.origins[0].content)
    assert digests[0] == digests[1] != digests[2]


def test_a_file_of_the_same_size_that_changes_in_a_process_is_read_again(tmp_path: Path) -> None:
    path, digests = tmp_path / "x", []
    for time, content in enumerate((b"one", b"two")):
        path.write_bytes(content)
        os.utime(path, ns=(0, time))
        digests += digests_of([path])
    assert digests == [hashlib.sha256(content).hexdigest() for content in (b"one", b"two")]
