"""Every registered component, run the same way: two decisions, a resume in mid-phase, one rank and two.

One rank makes logits, two do not (fused_head).
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import dataflex
from dataflex.core.registry import KINDS, REGISTRY
from dataflex.forward import fused
from dataflex.train.trainer.components import load_components
from dataflex.utils import dist
from tests import tiny_engine as tiny
from tests.component_cases import BATCH, CASES, SIZES, TIMES, UPDATE, WARMUP, Case, Outcome, Recorder
from tests.distributed import ROOT, run_ranks

SAVE_AT = WARMUP + UPDATE - 1
STEPS = WARMUP + UPDATE * TIMES


def build(case: Case, folder: Path, world: int, times: int = TIMES, mode: str | None = None) -> tuple[Any, Recorder]:
    """A fresh engine with ``case``'s component, as a user's YAML and `dataflex.initialize` make it.

    times: decisions; mode: of fused_head, by default one for each number of ranks: the run is the same.
    """
    components = folder / f"components_{dist.rank()}.yaml"  # a file of its own: the other rank may be reading
    folder.mkdir(parents=True, exist_ok=True)
    params = case.params | case.prepare(folder)
    components.write_text(yaml.safe_dump({f"{case.kind}s": {case.name: {"params": params}}}))
    recorder = Recorder()
    schedule = {"update_step": UPDATE, "update_times": times, "warmup_step": WARMUP}
    if case.kind == "weighter":
        schedule = {"warmup_step": WARMUP, "train_step": WARMUP + UPDATE * times}
    config = tiny.ds_config(3, micro_batch=BATCH // world)
    config["zero_optimization"] |= tiny.NEARBY
    engine = dataflex.initialize(
        model=tiny.model(case.model),
        config=config,
        dataflex={
            "train_type": case.train_type,
            "component_name": case.name,
            "components_cfg_file": str(components),
            "output_dir": str(folder),
            "fused_head": mode or ("on" if world > 1 else "off"),
            **schedule,
        },
        train_dataset={name: tiny.samples(size, seed=size) for name, size in SIZES.items()},
        eval_dataset={"near": tiny.samples(3, seed=1), "far": tiny.samples(3, seed=2)},
        tokenizer=tiny.PadZero(),
        hooks=[recorder],
    )
    return engine, recorder


def run(case: Case, folder: Path, world: int) -> dict[str, Any]:
    """The uninterrupted run, and the tail of one that a fresh engine resumed from its checkpoint.

    Every second case is resumed on one rank, the others on two.
    """
    engine, recorder = build(case, folder, world)
    losses = []
    for batch in engine.batches():
        losses.append(engine.training_step(batch))
        if engine.run.step == SAVE_AT:
            engine.save_checkpoint(folder)
    files = sorted((folder / "decisions").glob("*.json"), key=lambda p: int(p.stem.split("_")[1]))
    decisions = [json.loads(f.read_text()) for f in files]
    whole = [losses, recorder.phases, decisions, tiny.parameter_hash(engine)]
    if CASES.index(case) % 2 + 1 != world:
        return {"whole": whole}
    engine, recorder = build(case, folder, world)
    assert engine.load_checkpoint(folder)[1] == {}
    tail = [engine.training_step(batch) for batch in engine.batches()]
    return {"whole": whole, "tail": [tail, recorder.phases, tiny.parameter_hash(engine)]}


def all_cases(folder: str, world: int) -> dict[str, Any]:
    """Every case in one process group. A case that fails is reported as its text, and by its own test."""
    results: dict[str, Any] = {}
    fused.CHUNK_TOKENS = {"cpu": 16, "cuda": 16}
    for case in CASES:
        try:
            results[case.id] = run(case, Path(folder, case.id), world)
        except Exception:
            results[case.id] = traceback.format_exc()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, list[dict[str, Any]]]]:
    """{world size: each rank's results}."""
    yield {
        world: run_ranks(
            "tests.train.test_components:all_cases",
            world,
            folder=str(tmp_path_factory.mktemp(f"components{world}")),
            world=world,
        )
        for world in (1, 2)
    }


def outcome(result: Any) -> Outcome:
    losses, phases, decisions, digest = result["whole"]
    domain = np.repeat(np.arange(len(SIZES)), list(SIZES.values()))
    counts = [np.bincount(domain[ids], minlength=len(SIZES)).tolist() for ids in phases]
    return Outcome(losses, phases, counts, decisions, digest)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_component(case: Case, results: dict[int, list[dict[str, Any]]]) -> None:
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


def without_and_with_logits(folder: str, times: int) -> dict[str, Any]:
    """Of every case: losses and the samples of each phase, by fused_head."""
    fused.CHUNK_TOKENS = {"cpu": 16, "cuda": 16}
    found: dict[str, Any] = {}
    for case in CASES:
        found[case.id] = {}
        for mode in ("on", "off"):
            engine, recorder = build(case, Path(folder, case.id, mode), 1, times, mode)
            losses = [engine.training_step(batch) for batch in engine.batches()]
            found[case.id][mode] = losses, recorder.phases
    return found


@pytest.mark.slow
def test_twenty_steps_with_and_without_logits_are_the_same(tmp_path: Path) -> None:
    times = -(-(20 - WARMUP) // UPDATE)
    (found,) = run_ranks("tests.train.test_components:without_and_with_logits", 1, folder=str(tmp_path), times=times)
    assert set(found) == {case.id for case in CASES}
    for name, ((losses, phases), (others, other_phases)) in ((n, (f["on"], f["off"])) for n, f in found.items()):
        assert len(losses) >= 20 and phases == other_phases, name
        np.testing.assert_allclose(losses, others, rtol=0, atol=1e-5, err_msg=name)


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
