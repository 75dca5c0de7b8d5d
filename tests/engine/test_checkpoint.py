"""Checkpoints: bit-identical resume, whole or passed over, refused for another run, and safe to load."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dataflex
from dataflex.engine import checkpoint
from dataflex.engine.checkpoint import saving
from dataflex.utils import room
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.distributed import run_ranks

STEPS, SAVE_AT = 8, 4
MODELS = [("full", 0), ("lora", 1), ("full", 2), ("lora", 3), ("full", 3)]
POISON = 7


def build(stage: int = 3, kind: str = "full", micro: int | None = None, **changes: Any) -> Any:
    """An engine with dropout in its model, whose selector decides at steps 2 and 5; ``changes`` are of the run."""
    world = torch.distributed.get_world_size()
    samples, accumulation = changes.pop("samples", None) or tiny.samples(40, seed=9), changes.pop("accumulation", 2)
    return dataflex.initialize(
        model=tiny.model(kind, targets=tiny.FEW_TARGETS, attention_dropout=0.2, num_hidden_layers=1),
        config=tiny.ds_config(stage, micro_batch=micro or 4 // world, accumulation=accumulation),
        dataflex={
            "train_type": "dynamic_select",
            "component_name": "random",
            "warmup_step": 2,
            "update_step": 3,
            "update_times": 2,
            **changes,
        },
        train_dataset=samples,
        tokenizer=tiny.PadZero(),
    )


def resume(stage: int, kind: str, folder: Path) -> dict[str, Any]:
    """Losses and parameter hash of a run that saves in mid-phase, and of one resumed from there."""
    engine = build(stage, kind)
    losses = []
    for batch in engine.batches():
        losses.append(engine.training_step(batch))
        if engine.run.step == SAVE_AT:
            engine.save_checkpoint(folder, client_state={"note": ["kept", 1]})
    fresh = build(stage, kind)
    torch.manual_seed(1234 + torch.distributed.get_rank())
    _, client_state = fresh.load_checkpoint(folder)
    steps = fresh.run.step
    tail = [fresh.training_step(batch) for batch in fresh.batches()]
    return {
        "losses": losses,
        "hash": tiny.parameter_hash(engine),
        "client_state": client_state,
        "steps": steps,
        "tail": tail,
        "tail_hash": tiny.parameter_hash(fresh),
    }


def message(action: Callable[[], Any]) -> str:
    """The text of the UserError that ``action`` raises, or what it returned."""
    try:
        return f"no error: {action()}"
    except UserError as error:
        return str(error)


def poisoned() -> str:
    """The error of a run that meets samples with a token whose embedding is NaN."""
    samples = tiny.samples(16, seed=9)
    for sample in samples:
        sample["input_ids"] = [POISON + 1 if i == POISON else i for i in sample["input_ids"]]
    for i in (3, 11):
        samples[i]["input_ids"][1] = POISON
    net = tiny.model("full")
    with torch.no_grad():
        net.get_input_embeddings().weight[POISON] = float("nan")
    engine = dataflex.initialize(
        model=net,
        config=tiny.ds_config(2, micro_batch=16 // torch.distributed.get_world_size()),
        dataflex={"train_step": 2},
        train_dataset=samples,
        tokenizer=tiny.PadZero(),
    )
    return message(lambda: [engine.training_step(batch) for batch in engine.batches()])


def all_masked() -> str:
    """What a run that meets global batches without a trained token says: their losses are 0."""
    samples = tiny.samples(8, seed=9)
    for sample in samples[:-1]:
        sample["labels"] = [-100] * len(sample["labels"])
    engine = build(samples=samples, train_type="static", component_name=None, micro=1, train_step=4)
    return message(lambda: [engine.training_step(batch) for batch in engine.batches()])


def refusals(folder: Path) -> dict[str, str]:
    """What loading the checkpoint of MODELS' last run says in runs that differ in one thing."""
    zero3 = folder / "full3"
    tag = f"checkpoint-{SAVE_AT}"
    engine = build()
    next(batches := engine.batches())
    said = {
        "seed": message(lambda: build(seed=1).load_checkpoint(zero3)),
        "pool": message(lambda: build(samples=tiny.samples(40, seed=10)).load_checkpoint(zero3)),
        "packing": message(lambda: build(packing=True).load_checkpoint(zero3)),
        "micro_batch": message(lambda: build(micro=1).load_checkpoint(zero3)),
        "accumulation": message(lambda: build(accumulation=1).load_checkpoint(zero3)),
        "zero_stage": message(lambda: build(2).load_checkpoint(zero3)),
        "component": message(lambda: build(component_name="custom").load_checkpoint(zero3)),
        "schedule": message(lambda: build(update_step=4).load_checkpoint(zero3)),
        "nothing there": message(lambda: build().load_checkpoint(zero3, tag="checkpoint-99")),
        "none": message(lambda: build().load_checkpoint(folder / "empty")),
        "twice": message(lambda: engine.save_checkpoint(zero3, tag=tag)),
        "no folder": message(lambda: engine.save_checkpoint()),
        "no room": message(lambda: without_room(engine, folder / "full")),
        "full": message(lambda: on_a_full_disk(engine, folder / "full")),
        "state": message(lambda: engine.save_checkpoint(folder / "odd", client_state={"a": [Path("x")]})),
    }
    batches.close()
    return said | {"leftovers": after_a_broken_save(folder / "broken")}


def without_room(engine: Any, folder: Path) -> None:
    """A save onto a disk that has 10,000 bytes free."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
        engine.save_checkpoint(folder)


def on_a_full_disk(engine: Any, folder: Path) -> None:
    """A save that meets the end of the disk on its way."""

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving.torch, "save", full)
        engine.save_checkpoint(folder)


def after_a_broken_save(folder: Path) -> str:
    """What a save into a folder that an earlier one left half-written makes of it: why it is broken, or its files."""
    engine = build()
    for batch in engine.batches():
        engine.training_step(batch)
        break
    stale = folder / "checkpoint-1"
    stale.mkdir(parents=True, exist_ok=True)
    for name in ("zero_pp_rank_7_mp_rank_00_model_states.pt", f".{checkpoint.MANIFEST}.tmp", "notes.txt"):
        (stale / name).write_text("left behind")
    torch.distributed.barrier()
    engine.save_checkpoint(folder)
    return str(checkpoint.broken(stale) or sorted(p.name for p in stale.iterdir() if p.read_bytes() == b"left behind"))


def everything(folder: str, world: int) -> dict[str, Any]:
    home = Path(folder, str(world))
    results: dict[str, Any] = {f"{kind}{stage}": resume(stage, kind, home / f"{kind}{stage}") for kind, stage in MODELS}
    if world == 1:
        return results
    alone = Path(folder, "1", "full3")
    results["world_size"] = message(lambda: build(micro=4).load_checkpoint(alone))
    said = {"refusals": refusals(home), "poisoned": poisoned(), "all_masked": all_masked()}
    return results | said


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def results(home: Path) -> dict[int, list[dict[str, Any]]]:
    """{world size: each rank's results}; two ranks find the checkpoints of one, and say what is refused."""
    return {
        world: run_ranks("tests.engine.test_checkpoint:everything", world, folder=str(home), world=world)
        for world in (1, 2)
    }


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("kind", "stage"), MODELS)
def test_a_resume_in_mid_phase_is_bit_identical(kind: str, stage: int, world_size: int, results: Any) -> None:
    for rank in results[world_size]:
        run = rank[f"{kind}{stage}"]
        assert run["steps"] == SAVE_AT and len(run["losses"]) == STEPS
        assert run["client_state"] == {"note": ["kept", 1]}
        assert run["tail"] == run["losses"][SAVE_AT:]
        assert run["tail_hash"] == run["hash"]


REFUSALS = {
    "seed": "the checkpoint has seed 42, this run has 1; resume with the configuration that it was made with",
    "pool": "the checkpoint has pool ",
    "packing": "the checkpoint has packing None, this run has rows of 2048 tokens",
    "micro_batch": "full3/checkpoint-4: the checkpoint has a global batch of ",
    "accumulation": "full3/checkpoint-4: the checkpoint has a global batch of ",
    "zero_stage": "the checkpoint has zero_stage 3, this run has 2",
    "component": "the checkpoint has hooks ['SelectPlanner random'], this run has ['SelectPlanner custom']",
    "schedule": "the checkpoint is at step 4, inside a phase of 3 steps from step 2; this run's schedule has 4 from 2",
    "nothing there": "checkpoint-99: there is no such checkpoint",
    "none": "no error: (None, None)",
    "twice": "checkpoint-4: is a checkpoint already; a tag is never written twice",
    "no folder": "checkpoint: no folder was given and the run has no output_dir",
    "no room": "full/checkpoint-0: no room for a checkpoint: it takes about 1 MiB, the disk at /",
    "full": "full/checkpoint-0: the checkpoint could not be written: the disk at /",
    "state": "checkpoint: cannot save a PosixPath (in client_state.a.0)",
    "leftovers": "['notes.txt']",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_another_run_is_refused_with_the_key_named(case: str, results: Any) -> None:
    for rank in results[2]:
        assert REFUSALS[case] in rank["refusals"][case]


def test_another_global_batch_is_refused_with_values_that_fit(results: Any) -> None:
    for rank in results[2]:
        assert rank["world_size"].endswith(
            "checkpoint-4: the checkpoint has a global batch of 4 x 2 x 1 = 8 samples (per_device_train_batch_size x "
            "gradient_accumulation_steps x processes), this run has 4 x 2 x 2 = 16; with --num_processes 2 set "
            "per_device_train_batch_size: 4 and gradient_accumulation_steps: 1, or go on with --num_processes 1, "
            "per_device_train_batch_size: 4 and gradient_accumulation_steps: 2"
        )


def test_a_loss_that_is_not_finite_names_step_and_samples(results: Any) -> None:
    for rank in results[2]:
        assert rank["poisoned"] == (
            "step 1: the losses of sample ids [3, 11] ('train' at 3, 'train' at 11) are not finite; "
            "nothing was saved over the last good checkpoint (nonfinite: skip goes on without such steps)"
        )
        assert rank["all_masked"].startswith("no error: [") and "0.0" in rank["all_masked"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_file_loads_without_code(world_size: int, home: Path, results: Any) -> None:
    """torch.load(weights_only=True) takes every file, with the classes of DeepSpeed's that `load` allows."""
    files = sorted(Path(home, str(world_size)).rglob("*.pt"))
    assert len(files) >= 3 * len(MODELS)
    for file in files:
        allowed = [] if file.name.startswith("dataflex") else checkpoint.deepspeed_globals()
        with torch.serialization.safe_globals(allowed):
            torch.load(file, weights_only=True)


@pytest.fixture
def two(home: Path, tmp_path: Path, results: Any) -> Path:
    """A folder with two whole checkpoints of steps 2 and 4 (copies of one save)."""
    for step in (2, 4):
        shutil.copytree(home / "1" / "full0" / f"checkpoint-{SAVE_AT}", tmp_path / f"checkpoint-{step}")
    return tmp_path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a file is missing": (checkpoint.STATE, Path.unlink, f"{checkpoint.STATE} is missing"),
    "a byte is flipped": ("mp_rank_00_model_states.pt", flip, "mp_rank_00_model_states.pt differs"),
    "a file is cut short": ("mp_rank_00_model_states.pt", truncate, "mp_rank_00_model_states.pt differs"),
    "no manifest": (checkpoint.MANIFEST, Path.unlink, "the save did not finish"),
    "the manifest is cut short": (checkpoint.MANIFEST, truncate, f"{checkpoint.MANIFEST} cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_aloud(damage: str, two: Path, capsys: Any) -> None:
    assert checkpoint.newest_whole(two) == two / "checkpoint-4"
    name, hurt, why = DAMAGE[damage]
    hurt(two / "checkpoint-4" / name)
    assert checkpoint.newest_whole(two) == two / "checkpoint-2"
    said = capsys.readouterr().err
    assert "checkpoint-4: not a whole checkpoint, passed over" in said and why in said
    with pytest.raises(UserError, match="checkpoint-4: .*" + why):
        checkpoint.load(None, None, two / "checkpoint-4")
    hurt(two / "checkpoint-2" / name)
    assert checkpoint.newest_whole(two) is None


def test_the_newest_is_the_one_with_the_most_steps(two: Path) -> None:
    shutil.copytree(two / "checkpoint-2", two / "checkpoint-10")
    (two / "not-a-checkpoint").mkdir()
    assert checkpoint.newest_whole(two) == two / "checkpoint-10"
    assert checkpoint.newest_whole(two / "missing") is None


def test_the_manifest_lists_every_file_and_the_pointer_names_the_folder(home: Path, results: Any) -> None:
    folder = home / "2" / "full3" / f"checkpoint-{SAVE_AT}"
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {checkpoint.MANIFEST}
    assert {"dataflex_random_rank0.pt", "dataflex_random_rank1.pt", checkpoint.STATE} <= files
    assert manifest["step"] == SAVE_AT and manifest["world_size"] == 2
    assert (folder.parent / checkpoint.POINTER).read_text() == folder.name
