"""Every registered component, run the same way: two decisions, a resume in mid-phase, one rank and two.

One rank makes logits under ZeRO-2, two make none (fused_head) under ZeRO-3. And two ranks go on with what one has
saved, and one with that of two, as the uninterrupted run went on; where the micro-batches of all ranks together change,
what compares their samples is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dataflex.core.registry import KINDS, REGISTRY
from dataflex.train.trainer.components import load_components
from tests.component_cases import BATCH, CASES, SIZES, UPDATE, WARMUP, Case, Outcome
from tests.distributed import ROOT, run_ranks
from tests.train.component_runs import SAVE_AT, SPREAD, STEPS, splits_of

# {saved by: (ranks, micro-batch, gradient accumulation) that go on}; the second has another group of samples.
ELASTIC = {2: [(1, 4, 1), (1, 2, 2)], 1: [(2, 2, 1), (2, 1, 2)]}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """{world size: each rank's results}, and {world size: where its checkpoints are} as "folders"."""
    folders = {world: tmp_path_factory.mktemp(f"components{world}") for world in (1, 2)}
    found: dict[Any, Any] = {"folders": folders}
    for world, folder in folders.items():
        found[world] = run_ranks("tests.train.component_runs:all_cases", world, folder=str(folder), world=world)
    return found


def go_on_elsewhere(results: Any, folder: Path, names: list[str]) -> dict[str, Any]:
    """Rank 0's results of `elastic`, for what one rank and what two have saved."""
    found: dict[str, Any] = {}
    for saved_by, splits in ELASTIC.items():
        found |= run_ranks(
            "tests.train.component_runs:elastic",
            splits[0][0],
            folder=str(folder),
            saved=str(results["folders"][saved_by]),
            names=names,
            splits=splits,
        )[0]
    return found


def check_elastic(case: Case, results: Any, found: dict[str, Any]) -> None:
    for saved_by, splits in ELASTIC.items():
        whole = results[saved_by][0][case.id]
        for world, micro, steps in splits_of(case, splits):
            got = found[f"{case.id} {micro} x {steps} x {world}"]
            now, was = micro, BATCH // saved_by
            if case.compared == "global micro-batch":
                now, was = micro * world, BATCH
            if case.compared and now != was:
                words = (
                    f"compares the samples of a {case.compared}, which has {was} samples in the checkpoint and {now}"
                )
                assert isinstance(got, str) and words in got, got
                continue
            assert not isinstance(got, str), got
            assert got["ids"] == whole["ids"][SAVE_AT:]
            np.testing.assert_allclose(got["losses"], whole["whole"][0][SAVE_AT:], rtol=0, atol=1e-5)
            assert got["states"][0] == whole["states"][0], "what was saved is not what is loaded"
            assert_near(got["states"][1], whole["states"][1])


def assert_near(got: Any, want: Any) -> None:
    """The same numbers within the noise of sums, everything else the same."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        got, want = list(got.values()), list(want.values())
    if isinstance(want, list):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_near(one, other)
    else:
        assert got == (pytest.approx(want, rel=1e-4, abs=1e-5) if isinstance(want, float) else want)


def outcome(result: Any) -> Outcome:
    losses, phases, decisions, digest = result["whole"]
    domain = np.repeat(np.arange(len(SIZES)), list(SIZES.values()))
    counts = [np.bincount(domain[ids], minlength=len(SIZES)).tolist() for ids in phases]
    return Outcome(losses, phases, counts, decisions, digest)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_component(case: Case, results: dict[Any, Any]) -> None:
    found = [rank[case.id] for world in (1, 2) for rank in results[world]]
    failed = [text for text in found if isinstance(text, str)]
    assert not failed, failed[0]
    assert any("tail" in result for result in found)
    for result in found:
        got = outcome(result)
        check_run(case, got)
        if "tail" not in result:
            continue
        tail_losses, tail_phases, tail_hash = result["tail"]
        assert tail_losses == got.losses[SAVE_AT:], "the resumed run's losses differ"
        assert tail_hash == got.hash, "the resumed run's parameters differ"
        if case.kind != "weighter":
            assert tail_phases == got.phases[-1:], "the resumed run's decision differs"
    one, *two = (outcome(result) for result in found)
    for other in two:
        assert other.phases == one.phases
        np.testing.assert_allclose(other.losses, one.losses, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_twenty_steps_with_and_without_logits_are_the_same(tmp_path: Path) -> None:
    times = -(-(20 - WARMUP) // UPDATE)
    (found,) = run_ranks("tests.train.component_runs:without_and_with_logits", 1, folder=str(tmp_path), times=times)
    assert set(found) == {case.id for case in CASES}
    for name, ((losses, phases), (others, other_phases)) in ((n, (f["on"], f["off"])) for n, f in found.items()):
        assert len(losses) >= 20 and phases == other_phases, name
        np.testing.assert_allclose(losses, others, rtol=0, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def spread(results: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return go_on_elsewhere(results, tmp_path_factory.mktemp("spread"), list(SPREAD))


@pytest.mark.parametrize("name", SPREAD)
def test_one_rank_goes_on_for_two_and_two_for_one(name: str, results: dict[Any, Any], spread: dict[str, Any]) -> None:
    check_elastic(next(case for case in CASES if case.id == name), results, spread)


@pytest.fixture(scope="module")
def rest(results: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    names = [case.id for case in CASES if case.id not in SPREAD]
    return go_on_elsewhere(results, tmp_path_factory.mktemp("rest"), names)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.id not in SPREAD], ids=lambda case: case.id)
def test_every_component_goes_on_on_another_number_of_ranks(
    case: Case, results: dict[Any, Any], rest: dict[str, Any]
) -> None:
    check_elastic(case, results, rest)


def check_run(case: Case, got: Outcome) -> None:
    assert len(got.losses) == STEPS and np.isfinite(got.losses).all()
    if case.kind == "weighter":
        assert not got.decisions
    else:
        assert [len(ids) for ids in got.phases] == [WARMUP * BATCH, UPDATE * BATCH, UPDATE * BATCH]
        assert [d["step"] for d in got.decisions] == [WARMUP, WARMUP + UPDATE]
        assert {d["component"] for d in got.decisions} == {case.name}
    if case.kind == "selector":
        for decision, ids in zip(got.decisions, got.phases[1:], strict=True):
            assert sorted(decision["indices"]) == sorted(ids)
    case.expect(got)


def packaged(kind: str) -> set[str]:
    load_components()
    classes = {name: REGISTRY.get(kind, name) for name in REGISTRY.names(kind)}
    return {name for name, cls in classes.items() if cls.__module__.startswith("dataflex.")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_registered_component_has_a_row(kind: str) -> None:
    rows = {case.name for case in CASES if case.kind == kind}
    assert rows == packaged(kind), "add a row to tests/component_cases.py"


@pytest.mark.parametrize("kind", KINDS)
def test_every_registered_component_is_in_the_packaged_components_file(kind: str) -> None:
    entries = yaml.safe_load((ROOT / "configs" / "components.yaml").read_text())[f"{kind}s"]
    assert packaged(kind) <= {entry.get("name", name) for name, entry in entries.items()}
