"""A row for every key of the config: what a user asks for is what is built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataflex.config.schema import SECTION_OF, SECTIONS
from dataflex.utils.errors import UserError
from tests.asked import commands, data, engines, runs
from tests.asked.table import Build, Built, Row
from tests.distributed import run_ranks


@pytest.fixture(scope="module")
def engine_facts(workspace: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run_ranks("tests.asked.engines:facts", 2, folder=str(workspace))
    return found


def same(found: Any, right: Any) -> bool:
    """Equal, numbers to 1e-6; JSON has lists for tuples."""
    if isinstance(right, list | tuple):
        return len(found) == len(right) and all(map(same, found, right))
    if isinstance(right, dict):
        return found.keys() == right.keys() and all(same(found[key], right[key]) for key in right)
    if isinstance(right, float):
        return bool(found == pytest.approx(right, rel=1e-6, abs=1e-12))
    return bool(found == right)


def check(row: Row, found: Any, workspace: Path) -> None:
    right = row.right(workspace) if callable(row.right) else row.right
    assert same(found, right), f"{row.key}: {row.value!r} made {found}, expected {right}"


ON_ENGINES = [(build.name, at, row) for build in engines.BUILDS for at, row in enumerate(build.rows)]


@pytest.mark.parametrize(("build", "at", "row"), ON_ENGINES, ids=[f"{b}-{row.key}" for b, _, row in ON_ENGINES])
def test_what_is_asked_is_on_the_engine(
    engine_facts: list[dict[str, Any]], workspace: Path, build: str, at: int, row: Row
) -> None:
    for rank in engine_facts:
        check(row, rank[build][at], workspace)


def test_every_key_has_a_row_that_does_not_ask_for_the_default() -> None:
    rows = [row for room in (engines, data, runs, commands) for build in room.BUILDS for row in build.rows]
    assert {row.key for row in rows} | set(REFUSED) == set(SECTION_OF)
    for row in rows:
        section = SECTIONS[SECTION_OF[row.key]]
        asked = getattr(section.model_validate({row.key: row.value}), row.key)
        assert asked != section.model_fields[row.key].default, row.key


REFUSED = {"do_train": (False, "do_train: false is not supported: dataflex-cli train only trains")}


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_asked_is_refused(workspace: Path, key: str) -> None:
    value, text = REFUSED[key]
    with pytest.raises(UserError, match=text):
        Build("refused", (), {key: value}).config(workspace)


@pytest.fixture(scope="module")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """So that the data is tokenised here, and code of a model's own is copied here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        patch.syspath_prepend(modules)
        yield


@pytest.mark.parametrize("build", data.BUILDS, ids=lambda build: build.name)
def test_what_is_asked_is_in_the_data(private_cache: None, workspace: Path, build: Build) -> None:
    built = data.read(build, workspace)
    for row in build.rows:
        check(row, row.fact(built), workspace)


@pytest.fixture(scope="module")
def run_folders(workspace: Path) -> None:
    run_ranks("tests.asked.runs:run_all", 2, folder=str(workspace))


ON_DISK = [(build, row) for build in runs.BUILDS for row in build.rows]


@pytest.mark.parametrize(("build", "row"), ON_DISK, ids=[f"{build.name}-{row.key}" for build, row in ON_DISK])
def test_what_is_asked_is_in_the_run_folder(run_folders: None, workspace: Path, build: Build, row: Row) -> None:
    check(row, row.fact(Built(build.config(workspace), workspace)), workspace)


@pytest.mark.parametrize("build", commands.BUILDS, ids=lambda build: build.name)
def test_what_is_asked_is_what_a_command_does(private_cache: None, workspace: Path, build: Build) -> None:
    if build in (commands.CHOOSE, commands.UNLIKE, commands.IN_TURN) and not (workspace / "one").exists():
        commands.write_scores(build, workspace)
    built = Built(build.config(workspace), workspace)
    for row in build.rows:
        check(row, row.fact(built), workspace)
