"""What the ranks run for test_components.py: every component, whole, resumed, in another split, without logits."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import dataflex
from dataflex.forward import fused
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.component_cases import BATCH, CASES, SIZES, TIMES, UPDATE, WARMUP, Case, Recorder
from tests.tiny import byte_tokenizer

SAVE_AT = WARMUP + UPDATE - 1
STEPS = WARMUP + UPDATE * TIMES
# {ranks: (fused_head, ZeRO stage)}
HOW = {1: ("off", 2), 2: ("on", 3)}
SPREAD = ("selector-less", "mixer-doremi", "weighter-loss")


def build(
    case: Case,
    folder: Path,
    world: int,
    times: int = TIMES,
    mode: str | None = None,
    split: tuple[int, int] | None = None,
    stage: int | None = None,
) -> tuple[Any, Recorder]:
    """A fresh engine with ``case``'s component, as a user's YAML and `dataflex.initialize` make it.

    times: decisions; mode and stage: of fused_head and of ZeRO, by default those of `HOW`: the run is the same.
    split: the micro-batch and the steps of gradient accumulation, by default one step.
    """
    usual = HOW[world]
    components = folder / f"components_{dist.rank()}.yaml"  # a file of its own: the other rank may be reading
    folder.mkdir(parents=True, exist_ok=True)
    params = case.params | case.prepare(folder)
    components.write_text(yaml.safe_dump({f"{case.kind}s": {case.name: {"params": params}}}))
    recorder = Recorder()
    schedule = {"update_step": UPDATE, "update_times": times, "warmup_step": WARMUP}
    if case.kind == "weighter":
        schedule = {"warmup_step": WARMUP, "train_step": WARMUP + UPDATE * times}
    micro, steps = split or (BATCH // world, 1)
    config = tiny.ds_config(stage or usual[1], micro_batch=micro, accumulation=steps)
    engine = dataflex.initialize(
        model=tiny.model(case.model, num_hidden_layers=1),
        config=config,
        dataflex={
            "train_type": case.train_type,
            "component_name": case.name,
            "components_cfg_file": str(components),
            "output_dir": str(folder),
            "fused_head": mode or usual[0],
            **schedule,
        },
        train_dataset={name: tiny.samples(size, seed=size) for name, size in SIZES.items()},
        eval_dataset={"near": tiny.samples(3, seed=1), "far": tiny.samples(3, seed=2)},
        tokenizer=byte_tokenizer(),
        hooks=[recorder],
    )
    return engine, recorder


def run(case: Case, folder: Path, world: int) -> dict[str, Any]:
    """The uninterrupted run, and the tail of one that a fresh engine resumed from its checkpoint.

    Every second case is resumed on one rank, the others on two.
    """
    engine, recorder = build(case, folder, world)
    losses, ids, saved = [], [], None
    for batch in engine.batches():
        losses.append(engine.training_step(batch))
        ids.append(batch.sample_ids.tolist())
        if engine.run.step == SAVE_AT:
            engine.save_checkpoint(folder)
            saved = states(engine)
    files = sorted((folder / "decisions").glob("*.json"), key=lambda p: int(p.stem.split("_")[1]))
    decisions = [json.loads(f.read_text()) for f in files]
    whole = [losses, recorder.phases, decisions, tiny.parameter_hash(engine)]
    found = {"whole": whole, "ids": ids, "states": [saved, states(engine)]}
    if CASES.index(case) % 2 + 1 != world:
        return found
    engine, recorder = build(case, folder, world)
    assert engine.load_checkpoint(folder)[1] == {}
    tail = [engine.training_step(batch) for batch in engine.batches()]
    return found | {"tail": [tail, recorder.phases, tiny.parameter_hash(engine)]}


def states(engine: Any) -> Any:
    """What the hooks would save, as JSON holds it."""
    return plain([hook.state_dict() for hook in engine._loop.hooks])


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor | np.ndarray | np.generic) else value


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


def elastic(folder: str, saved: str, names: list[str], splits: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Each case of ``names`` that goes on with its checkpoint in ``saved``, in each split; or what refuses it."""
    found: dict[str, Any] = {}
    for case in (case for case in CASES if case.id in names):
        for world, micro, steps in splits_of(case, splits):
            key = f"{case.id} {micro} x {steps} x {world}"
            try:
                engine, _ = build(case, Path(folder, key), world, split=(micro, steps), stage=HOW[3 - world][1])
                engine.load_checkpoint(Path(saved, case.id))
                loaded, losses, ids = states(engine), [], []
                for batch in engine.batches():
                    losses.append(engine.training_step(batch))
                    ids.append(batch.sample_ids.tolist())
                found[key] = {"losses": losses, "ids": ids, "states": [loaded, states(engine)]}
            except UserError as error:
                found[key] = str(error)
    return found


def splits_of(case: Case, splits: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """What is tried: everything, but where time counts, of what compares nothing."""
    return splits[:1] if case.id in SPREAD and not case.compared else splits


def without_and_with_logits(folder: str, times: int) -> dict[str, Any]:
    """Of every case: losses and the samples of each phase, by fused_head."""
    fused.CHUNK_TOKENS = {"cpu": 16, "cuda": 16}
    found: dict[str, Any] = {}
    for case in CASES:
        found[case.id] = {}
        for mode in ("on", "off"):
            engine, recorder = build(case, Path(folder, case.id, mode), 1, times, mode, stage=3)
            losses = [engine.training_step(batch) for batch in engine.batches()]
            found[case.id][mode] = losses, recorder.phases
    return found
