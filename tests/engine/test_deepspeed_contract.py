"""`save_checkpoint` and `load_checkpoint` as DeepSpeed has them, and a running job's own checkpoint to start from."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dataflex
from dataflex.engine import checkpoint
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.distributed import run_ranks

FLEX = {
    "train_type": "dynamic_select",
    "component_name": "random",
    "warmup_step": 1,
    "update_step": 2,
    "update_times": 1,
}


def plain_engine(stage: int, seed: int = 0, kind: str = "full") -> Any:
    """DeepSpeed's own; ``seed`` moves its trained weights away from those of seed 0."""
    import deepspeed

    net = tiny.model(kind, targets=tiny.FEW_TARGETS, num_hidden_layers=1)
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad and seed:
                p.add_(0.1 * torch.randn(p.shape, generator=made))
    trained = [p for p in net.parameters() if p.requires_grad]
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 1e-3, "warmup_type": "linear"}}
    return deepspeed.initialize(model=net, config=tiny.ds_config(stage, scheduler=scheduler), model_parameters=trained)[
        0
    ]


def wrap(engine: Any) -> Any:
    return dataflex.initialize(
        engine=engine, dataflex=FLEX, train_dataset=tiny.samples(24, 1), tokenizer=tiny.PadZero()
    )


def plain_steps(engine: Any, count: int) -> None:
    """A job that knows nothing of dataflex."""
    for step in range(count):
        ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(step))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()


def train(engine: Any, until: int = 3) -> list[float]:
    losses = []
    for batch in engine.batches():
        losses.append(engine.training_step(batch))
        if engine.run.step == until:
            break
    return losses


def said(action: Callable[[], Any]) -> str:
    try:
        return f"no error: {action()}"
    except UserError as error:
        return str(error)


def from_a_running_job(folder: Path, stage: int, kind: str) -> dict[str, Any]:
    """A job's engine that is wrapped, against its checkpoint that is loaded into a wrapped engine of other weights."""
    job = plain_engine(stage, kind=kind)
    plain_steps(job, 2)
    job.save_checkpoint(str(folder), tag="job", client_state={"note": 5})
    there = tiny.parameter_hash(job)
    wrapped = wrap(job)
    torch.manual_seed(1)
    losses = train(wrapped)
    again = wrap(plain_engine(stage, seed=9, kind=kind))
    path, client_state = again.load_checkpoint(folder)
    loaded = tiny.parameter_hash(again)
    torch.manual_seed(1)
    return {
        "loaded": loaded == there,
        "path": Path(path).relative_to(folder).parts[0],
        "note": client_state["note"],
        "steps": [again.run.step, again.global_steps],
        "losses": [losses, train(again)],
        "rates": [wrapped.get_lr(), again.get_lr()],
        "hashes": [tiny.parameter_hash(wrapped), tiny.parameter_hash(again)],
        "done": [again.run.step, again.global_steps],
    }


def options(folder: Path, stage: int, kind: str) -> dict[str, Any]:
    """DeepSpeed's arguments, on checkpoints of dataflex."""
    engine = wrap(plain_engine(stage, kind=kind))
    returned = engine.save_checkpoint(folder, client_state={"at": 0})
    before = tiny.parameter_hash(engine)
    losses = train(engine)
    trained = tiny.parameter_hash(engine)
    engine.save_checkpoint(folder, client_state={"at": 3}, save_latest=False)
    found: dict[str, Any] = {"returned": returned, "pointer": (folder / "latest").read_text()}

    def load(**how: Any) -> dict[str, Any]:
        other = wrap(plain_engine(stage, seed=9, kind=kind))
        path, client_state = other.load_checkpoint(folder, **how)
        state = {"path": Path(path).parent.name, "client": client_state, "hash": tiny.parameter_hash(other)}
        state["steps"] = [other.run.step, other.global_steps]
        return state | ({} if how else {"then": train(other)})

    first, last = load(), load(tag="checkpoint-3")
    found["first"] = [first["path"], first["client"], first["hash"] == before, first["steps"], first["then"] == losses]
    found["last"] = [last["path"], last["client"], last["hash"] == trained, last["steps"]]
    weights = load(load_module_only=True)
    found["module only"] = [weights["hash"] == before, weights["steps"], weights["client"]]
    engine.save_checkpoint(folder, tag="mid", exclude_frozen_parameters=False)
    fresh = load(tag="mid", load_optimizer_states=False, load_lr_scheduler_states=False)
    found["no optimizer"] = [fresh["hash"] == trained, fresh["steps"]]
    found["wrong pointer"] = said(lambda: load(tag="checkpoint-0", load_module_only=True))
    placed = wrap(plain_engine(stage, seed=9, kind=kind))
    placed.load_checkpoint(folder, "mid", True, False, False)
    found["by position"] = [tiny.parameter_hash(placed) == trained, [placed.run.step, placed.global_steps]]
    (folder / "latest").write_bytes(b"\xff/..")
    found["damaged pointer"] = said(lambda: load(tag="mid", load_module_only=True))
    return found


def refusals(folder: Path) -> dict[str, str]:
    """What is said of checkpoints and engines that cannot be taken; the checkpoints are those of the test's runs."""
    wrapped, plain = wrap(plain_engine(2)), plain_engine(2)
    plain_steps(plain, 1)
    bad = folder / "bad"
    plain.save_checkpoint(str(bad), tag="args", client_state={"args": argparse.Namespace(x=1)})
    nothing = folder / "nothing"
    nothing.mkdir(exist_ok=True)
    model = tiny.model("full")
    arguments: dict[str, Any] = {"train_dataset": tiny.samples(8, 1), "tokenizer": tiny.PadZero()}
    give: Callable[..., Any] = lambda **what: said(lambda: dataflex.initialize(**arguments, **what))  # noqa: E731
    return {
        "nothing": str(wrapped.load_checkpoint(nothing)),
        "needs code": said(lambda: wrapped.load_checkpoint(bad)),
        "to score": said(lambda: checkpoint.load_weights(plain, bad / "args")),
        "other stage": said(lambda: wrap(plain_engine(3)).load_checkpoint(bad)),
        "wrapped": give(engine=wrapped),
        "wrapped model": give(model=wrapped, config=tiny.ds_config(2)),
        "engine as model": give(model=plain, config=tiny.ds_config(2)),
        "engine and model": give(engine=plain, model=model, config=tiny.ds_config(2)),
        "tuple": give(engine=(plain, None)),
        "neither": give(),
    }


def everything(folder: str, runs: list[tuple[int, str]]) -> dict[str, Any]:
    """Of each run; on two ranks what is refused too."""
    home = Path(folder)
    found: dict[str, Any] = {
        f"{kind}{stage}": from_a_running_job(home / f"j{kind}{stage}", stage, kind) for stage, kind in runs
    }
    found |= {f"options {kind}{stage}": options(home / f"o{kind}{stage}", stage, kind) for stage, kind in runs}
    return found | ({"refusals": refusals(home)} if len(runs) > 1 else {})


# {ranks: (ZeRO stage, kind of model)}
RUNS = {1: [(3, "full")], 2: [(0, "full"), (2, "lora"), (3, "full")]}
EVERY = [(f"{kind}{stage}", world) for world, runs in RUNS.items() for stage, kind in runs]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    target = "tests.engine.test_deepspeed_contract:everything"
    return {
        world: run_ranks(target, world, folder=str(tmp_path_factory.mktemp("c")), runs=runs)
        for world, runs in RUNS.items()
    }


@pytest.mark.parametrize(("run", "world_size"), EVERY)
def test_a_running_jobs_engine_and_its_checkpoint_go_on_alike(run: str, world_size: int, found: Any) -> None:
    for rank in found[world_size]:
        got = rank[run]
        assert got["loaded"] and got["path"] == "job" and got["note"] == 5
        assert got["steps"] == [0, 2] and got["done"] == [3, 5]
        assert got["rates"][0] == got["rates"][1] == pytest.approx([4e-4])
        assert got["losses"][0] == got["losses"][1] and len(got["losses"][0]) == 3
        assert got["hashes"][0] == got["hashes"][1]


@pytest.mark.parametrize(("run", "world_size"), EVERY)
def test_deepspeeds_arguments_do_what_they_say(run: str, world_size: int, found: Any) -> None:
    """The first checkpoint is of before the first step; `latest` names it until the one of step 3 is saved with it."""
    for rank in found[world_size]:
        got = rank[f"options {run}"]
        assert got["returned"] is True and got["pointer"] == "checkpoint-0"
        assert got["first"] == ["checkpoint-0", {"at": 0}, True, [0, 0], True]
        assert got["last"] == ["checkpoint-3", {"at": 3}, True, [3, 3]]
        assert got["module only"] == [True, [0, 0], {"at": 0}]
        assert got["no optimizer"] == got["by position"] == [True, [3, 3]]
        refused = "under ZeRO-3 DeepSpeed loads weights without the optimizer only from the checkpoint that"
        assert (refused in got["wrong pointer"]) is run.endswith("3")
        assert ("latest names, which is nothing there, not mid" in got["damaged pointer"]) is run.endswith("3")


REFUSED = {
    "to score": "it is a checkpoint of DeepSpeed's own, without what dataflex needs; train can start from it",
    "nothing": "(None, None)",
    "needs code": "holds an object that only code can load, and no code of a checkpoint is run; name its class",
    "other stage": "this run has ZeRO-3 on",
    "wrapped": "engine: is wrapped by dataflex already",
    "wrapped model": "model: is an engine of dataflex.initialize already",
    "engine as model": "model: is a DeepSpeed engine already; pass it as engine=",
    "engine and model": "engine: is made already, so model, config would not be used; drop them",
    "tuple": "engine: expected the first of what deepspeed.initialize returns, got a tuple",
    "neither": "initialize: pass model and config, or an engine",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_taken_is_said_in_one_line(case: str, found: Any) -> None:
    for rank in found[2]:
        assert REFUSED[case] in rank["refusals"][case]
        assert "\n" not in rank["refusals"][case]
