"""docs/reliability.md: every row names a test that is there, and every kind of file, signal and exit code has a row."""

from __future__ import annotations

import ast
import functools
import re
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from dataflex.core.run_files import RUN_FILES
from dataflex.data import cache
from dataflex.data.chosen import CHOSEN
from dataflex.data.sources.info import INFO_FILE
from dataflex.data.sources.read import FILE_TYPES
from dataflex.driver import scores
from dataflex.engine import checkpoint
from dataflex.engine.checkpoint.manifest import random_state_file
from dataflex.engine.models.handover import GENERATION
from dataflex.scoring.kept import store
from dataflex.utils import lock
from dataflex.utils.stopping import SIGNALS

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
REFERENCE = re.compile(r"`([\w/]*\.py)?::(test_\w+)(?:\[([^\]`]+)\])?`(?P<slow> \(slow\))?")
# Beside the files of a run folder: what lies in those that are folders, what is read, and what is kept elsewhere.
OTHER_FILES = [
    *(checkpoint.MANIFEST, checkpoint.STATE, random_state_file(0).replace("0", "*"), "*_states.pt"),
    *(store.MANIFEST, "*.npy", cache.MANIFEST, scores.FACTS, scores.TABLE, scores.HELD_OUT, CHOSEN, lock.LOCK),
    *(lock.HEARTBEAT, INFO_FILE, *(f"*{ending}" for ending in FILE_TYPES), GENERATION, "*.so", "*.o", "*.sha256"),
    *("YAML that is run", "DeepSpeed file", "components_cfg_file", "sample_weight", "class_weights", "tokenized_path"),
]


class Row(NamedTuple):
    """A row of a table whose last column is `test`. section: the heading above it."""

    section: str
    cells: list[str]

    @property
    def references(self) -> list[tuple[str, str, str, bool]]:
        """(file, test, case or "", whether it is said to be slow); a name without a file is of the file before it."""
        found, file = [], ""
        for match in REFERENCE.finditer(self.cells[-1]):
            file = match[1] or file
            found.append((file, match[2], match[3] or "", match["slow"] is not None))
        return found


def rows() -> list[Row]:
    made, section, wanted = [], "", False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            section = line.strip("# ")
        if not line.startswith("|"):
            wanted = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[-1] == "test":
            wanted = True
        elif wanted and not set(line) <= set("|- "):
            made.append(Row(section, cells))
    return made


ROWS = rows()
FAULTS = [row for row in ROWS if len(row.cells) == 4 and row.section != "Fuzzing"]


@functools.cache
def named_tests(file: str) -> dict[str, bool]:
    """{test: whether it is marked slow as a whole} of a file under tests/."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {
        node.name: any(ast.unparse(mark) == "pytest.mark.slow" for mark in node.decorator_list)
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


def test_the_page_is_read() -> None:
    assert len(FAULTS) > 60 and {row.section for row in ROWS} >= {"Files", "Fuzzing", "Security"}
    assert all(re.fullmatch(r"[^`]*(`[^`]*`[^`]*)*", cell) for row in ROWS for cell in row.cells)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.cells[0][:60])
def test_a_row_names_tests_that_are_there(row: Row) -> None:
    assert row.references, row.cells[-1]
    left = re.sub(r"[\s,;]|and", "", REFERENCE.sub("", row.cells[-1]))
    assert not left, f"not the name of a test: {left}"
    for file, name, case, slow in row.references:
        assert (TESTS / file).is_file(), file
        assert name in named_tests(file), f"{file} has no {name}"
        assert slow or not named_tests(file)[name], f"{name}: the page does not say that it is slow"
        assert case in (TESTS / file).read_text(encoding="utf-8"), f"{file}: no case {case}"


@pytest.mark.parametrize("name", [*(file.pattern for file in RUN_FILES), *OTHER_FILES])
def test_every_kind_of_file_has_a_row(name: str) -> None:
    first = [row.cells[0] for row in FAULTS]
    assert any(f"`{name}`" in cell or (" " in name and name in cell) for cell in first), f"no row names {name}"


@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_every_signal_has_a_row(number: signal.Signals) -> None:
    assert any(re.search(rf"\b{number.name}\b", row.cells[0]) for row in FAULTS)


def test_no_row_is_without_what_happens_and_what_is_lost() -> None:
    assert [row.cells[0] for row in FAULTS if not all(row.cells)] == []
    assert all(len(row.cells) in (3, 4) for row in ROWS)
