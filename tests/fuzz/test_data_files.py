"""Damaged data files of every type, and rows of any content: a UserError of one line or rows, never anything else.

The files are read in child processes, many in each: a damaged table can end a process.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataflex.data.sources.convert import Converter
from dataflex.data.sources.expression import Expression
from dataflex.data.sources.info import read_dataset_infos
from dataflex.data.sources.source import record_of
from dataflex.utils.errors import UserError
from tests.fuzz.mutate import WHOLE, damaged

ROOT = Path(__file__).parents[2]
BATCH = 300
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([10**400, "\ud800", -1]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def run_batch(folder: Path, cases: list[tuple[str, str, bytes]]) -> None:
    """Have a child read the cases, and fail with the one that it did not survive; the file stays in ``folder``."""
    folder.mkdir(parents=True)
    entries: dict[str, Any] = {}
    for number, (suffix, formatting, content) in enumerate(cases):
        name = f"d{number}"
        (folder / f"{name}{suffix}").write_bytes(content)
        entries[name] = {"file_name": f"{name}{suffix}", "formatting": formatting}
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    command = [sys.executable, "-m", "tests.fuzz.child", str(folder), "0"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=30 + len(cases))
    last = done.stdout.split()[-1:]
    assert last == ["done"], (
        f"{folder}: case {last} of {list(entries)[int(last[0])] if last else ''}: {done.stderr[-1500:]}"
    )


def batch(seed: int, count: int) -> list[tuple[str, str, bytes]]:
    rng = random.Random(seed)
    chosen = [rng.choice(WHOLE) for _ in range(count)]
    return [(suffix, formatting, damaged(content, rng)) for suffix, formatting, content in chosen]


def test_the_files_are_read_where_they_are_whole(tmp_path: Path) -> None:
    run_batch(tmp_path / "whole", WHOLE)


def test_damaged_files_are_told_in_one_line(tmp_path: Path) -> None:
    run_batch(tmp_path / "batch", batch(1, BATCH))


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(2, 2**32))
def test_thousands_of_damaged_files(tmp_path: Path, seed: int) -> None:
    run_batch(Path(tempfile.mkdtemp(dir=tmp_path)) / "batch", batch(seed, BATCH))


def any_row(data_dir: Path, row: dict[str, Any]) -> None:
    """Convert a row in every way; UserErrors must be of one line."""
    ways = {
        "a": {},
        "o": {"formatting": "openai"},
        "s": {"formatting": "sharegpt", "columns": {"messages": "messages"}},
    }
    text = {name: {"file_name": "x.json", **way} for name, way in ways.items()}
    (data_dir / "dataset_info.json").write_text(json.dumps(text))
    for info in read_dataset_infos(list(text), data_dir):
        for weight, tokens, kept in ((None, None, None), ("w", "t", "kept"), ("log(w) * 2", None, "messages")):
            try:
                made = record_of(row, Converter(info, "sft", weight, tokens, kept), "x:1", "x:1")
                json.dumps(made).encode("utf-8")
                assert all(turn["content"].encode("utf-8") is not None for turn in made["turns"])
                made["kept"].encode("utf-8")
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) <= 2000


MESSAGE = st.fixed_dictionaries(
    {}, optional={key: JSON | st.sampled_from(["user", "assistant", "human", "gpt", "tool"]) for key in
                  ("role", "content", "tool_calls", "from", "value")}
)  # fmt: skip
ROW = st.fixed_dictionaries(
    {},
    optional={key: JSON for key in ("instruction", "input", "output", "history", "system", "w", "t", "kept")}
    | {"messages": JSON | st.lists(MESSAGE, max_size=4)},
)
EXPRESSION = st.text(alphabet="wlog(),*/+-%<>=.0159 eabsmxint_[]:\"'\u00e9\n", max_size=60)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(row=ROW)
def test_rows_of_any_content(tmp_path: Path, row: dict[str, Any]) -> None:
    any_row(tmp_path, row)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
@given(row=ROW)
def test_thousands_of_rows_of_any_content(tmp_path: Path, row: dict[str, Any]) -> None:
    any_row(tmp_path, row)


def any_expression(text: str, w: float) -> None:
    try:
        expression = Expression(text)
        assert isinstance(expression(dict.fromkeys(expression.columns, w)), float)
    except UserError as error:
        assert str(error)


@settings(max_examples=200, deadline=2000)
@given(text=EXPRESSION, w=st.floats())
def test_expressions_of_any_text(text: str, w: float) -> None:
    any_expression(text, w)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=2000)
@given(text=EXPRESSION, w=st.floats())
def test_thousands_of_expressions(text: str, w: float) -> None:
    any_expression(text, w)
