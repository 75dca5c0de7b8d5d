"""A step with nothing to train, or that is not finite and skipped, moves the schedule and nothing else."""

from __future__ import annotations

import copy
import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import dataflex
from dataflex.core.hook import Hook, Weigher
from dataflex.engine import checkpoint
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.distributed import run_ranks

STEPS, LEFT_OUT = 5, 2
CASES = [(0, False), (1, False), (2, False), (3, False), (0, True), (2, True), (3, True)]


class AtStep(Weigher):
    """Weighs the samples of one step by ``value``, or returns a loss of that value (``scalar``); others as they are."""

    def __init__(self, value: float, scalar: bool = False, always: bool = False) -> None:
        self.value, self.scalar, self.always = value, scalar, always

    def weigh(self, run: Any, micro: Any, losses: Any, outputs: Any) -> Any:
        if self.scalar:
            return losses.loss.mean() * (self.value if run.step == LEFT_OUT else 1.0)
        here = self.always or run.step == LEFT_OUT
        return torch.full_like(losses.loss.detach(), self.value if here else 1.0)


class SpoiltGradient(Hook):
    """Makes the gradient of one weight NaN in one step, while the loss stays finite."""

    def on_train_start(self, run: Any) -> None:
        self.run = run
        weight = next(p for n, p in run.engine.module.named_parameters() if "down_proj" in n)
        weight.register_hook(lambda g: g * math.nan if self.run.step == LEFT_OUT else g)


def build(pool: list[Any], stage: int, bf16: bool = False, hooks: tuple[Hook, ...] = (), **flex: Any) -> Any:
    """An engine with weight decay, momentum and a falling rate, two micro-batches a step."""
    world = torch.distributed.get_world_size()
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}}
    rate = {"warmup_max_lr": 1e-2, "warmup_num_steps": 1, "total_num_steps": 2 * STEPS, "warmup_type": "linear"}
    return dataflex.initialize(
        model=tiny.model("full", torch.bfloat16 if bf16 else torch.float32, num_hidden_layers=1),
        config=tiny.ds_config(
            stage,
            micro_batch=4 // world,
            accumulation=2,
            optimizer=optimizer,
            scheduler={"type": "WarmupDecayLR", "params": rate},
            bf16={"enabled": bf16},
        ),
        dataflex={"train_step": STEPS, "seed": 1, **flex},
        train_dataset=pool,
        tokenizer=tiny.PadZero(),
        hooks=hooks,
    )


def state_of(engine: Any) -> str:
    """Hash of this rank's weights and of all that its optimizer remembers."""
    digest = hashlib.sha256()
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    tensors = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    for weight, state in inner.state.items():
        tensors += [weight, *(torch.as_tensor(state[key]) for key in sorted(state))]
    for tensor in tensors:
        digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train(engine: Any, leave_out: bool = False) -> dict[str, Any]:
    """Losses, rates and states by step. leave_out: one step is not trained, only counted and its rate moved by hand."""
    found: dict[str, Any] = {"losses": [], "rates": [], "states": [], "ids": None, "norms": [], "applied": []}
    for batch in engine.batches():
        if engine.run.step == LEFT_OUT:
            found["ids"] = batch.sample_ids.tolist()
        if leave_out and engine.run.step == LEFT_OUT:
            engine.run.step += 1
            engine.lr_scheduler.step()
            found["losses"].append(0.0)
        else:
            found["losses"].append(engine.training_step(batch))
        found["rates"].append(engine.get_lr())
        found["states"].append(state_of(engine))
        found["norms"].append(engine.get_global_grad_norm() is not None)
        found["applied"].append(engine.was_step_applied())
    return found | {"skipped": engine.skipped_steps, "steps": engine.run.step}


def masked(pool: list[Any], ids: list[int]) -> list[Any]:
    made = copy.deepcopy(pool)
    for i in ids:
        made[i]["labels"] = [-100] * len(made[i]["labels"])
    return made


def pool_of(weight: float | None = None, ids: Any = ()) -> list[Any]:
    """Samples, with weights of their own where ``weight``, that of ``ids``, is given."""
    made: list[Any] = tiny.samples(40, seed=9)
    for i, sample in enumerate(made if weight is not None else []):
        sample["sample_weight"] = weight if i in ids else 1.0
    return made


def masked_runs(folder: str) -> dict[str, Any]:
    """Each case: a run that meets a masked batch and one that goes without it; and one resumed right after it."""
    found = {}
    for stage, bf16 in CASES:
        want = train(build(pool_of(), stage, bf16), leave_out=True)
        pool = masked(pool_of(), want["ids"])
        got = train(build(pool, stage, bf16))
        saving = build(pool, stage, bf16)
        place = Path(folder, f"{stage}{bf16}{torch.distributed.get_world_size()}")
        for batch in saving.batches():
            saving.training_step(batch)
            if saving.run.step == LEFT_OUT + 1:
                saving.save_checkpoint(place)
                break
        fresh = build(pool, stage, bf16)
        fresh.load_checkpoint(place)
        found[f"zero{stage} bf16 {bf16}"] = {"want": want, "got": got, "resumed": train(fresh)}
    return found


def kinds_of_nothing() -> dict[str, Any]:
    """All the ways in which nothing of a step counts, on ZeRO-2, and what came of the step."""
    ids = train(build(pool_of(), 2), leave_out=True)["ids"]
    found = {}
    for normalization in ("mean", "sum_weights", "tokens"):
        how = {"weight_normalization": normalization}
        found[f"static 0, {normalization}"] = train(build(pool_of(0.0, ids), 2, **how))
        found[f"masked, {normalization}"] = train(build(masked(pool_of(2.0, ids), ids), 2, **how))
        found[f"weigher 0, {normalization}"] = train(build(pool_of(), 2, hooks=(AtStep(0.0),), **how))
    found["weigher's loss 0"] = train(build(pool_of(), 2, hooks=(AtStep(0.0, scalar=True),)))
    found["weigher's loss, masked"] = train(build(masked(pool_of(), ids), 2, hooks=(AtStep(1.0, scalar=True),)))
    tokens = pool_of()
    for i, sample in enumerate(tokens):
        sample["token_weight"] = [0.0 if i in ids else 1.0] * len(sample["labels"])
    found["tokens 0"] = train(build(tokens, 2))
    return found


def nonfinite(folder: str) -> dict[str, Any]:
    """A step that is not finite: skipped, stopped at, too many, and too many with a resume among them."""
    skip = {"nonfinite": "skip", "nonfinite_limit": 2}
    found: dict[str, Any] = {}
    for stage, bf16 in CASES:
        want = train(build(pool_of(), stage, bf16, hooks=(AtStep(1.0),)), leave_out=True)
        got = train(build(pool_of(), stage, bf16, hooks=(AtStep(math.inf),), **skip))
        found[f"zero{stage} bf16 {bf16}"] = {"want": want, "got": got}
    want = train(build(pool_of(), 3), leave_out=True)
    got = train(build(pool_of(), 3, hooks=(SpoiltGradient(),), **skip))
    found["gradient"] = {"want": want, "got": got}
    said = {}
    for name, hooks, flex in (
        ("stop", (AtStep(math.nan),), {}),
        ("gradient", (SpoiltGradient(),), {}),
        ("bound", (AtStep(math.nan, always=True),), skip),
        ("resumed", (AtStep(math.nan, always=True),), skip),
    ):
        engine, states = build(pool_of(), 2, hooks=hooks, **flex), []
        if name == "resumed":
            engine.load_checkpoint(folder)
        try:
            for batch in engine.batches():
                states.append(state_of(engine))
                engine.training_step(batch)
                if name == "bound" and engine.run.step == 1:
                    engine.save_checkpoint(folder)
        except UserError as exc:
            said[name] = [str(exc), states[-1] == state_of(engine), engine.run.step]
    return found | {"said": said}


def refused_saves(folder: str) -> dict[str, Any]:
    """What saving says of weights and moments that are not finite, and which checkpoint is then the newest."""
    said = {}
    for what in ("weight", "moment"):
        engine, place = build(pool_of(), 0), Path(folder, what)
        batches = engine.batches()
        engine.training_step(next(batches))
        engine.save_checkpoint(place)
        engine.training_step(next(batches))
        weight = next(engine.module.parameters())
        with torch.no_grad():
            (weight if what == "weight" else engine.optimizer.state[weight]["exp_avg"]).view(-1)[3] = math.nan
        try:
            engine.save_checkpoint(place)
            said[what] = ["saved"]
        except UserError as exc:
            newest = checkpoint.newest_whole(place)
            said[what] = [str(exc).replace(folder, ""), None if newest is None else newest.name]
    return said


def check(want: dict[str, Any], got: dict[str, Any], case: str, loss: float = 0.0) -> None:
    """The run is that without the step, bit for bit; the step's own loss is ``loss``."""
    at = got["losses"].pop(LEFT_OUT)
    want["losses"].pop(LEFT_OUT)
    assert at == loss or (math.isnan(at) and math.isnan(loss)), case
    assert got["losses"] == want["losses"], case
    assert got["rates"] == want["rates"] and got["rates"][LEFT_OUT] != got["rates"][LEFT_OUT - 1], case
    assert got["states"] == want["states"], case
    assert got["states"][LEFT_OUT] == got["states"][LEFT_OUT - 1] != got["states"][LEFT_OUT + 1], case
    assert (got["skipped"], got["steps"]) == (1, STEPS), case
    assert not got["norms"][LEFT_OUT], case
    assert got["applied"] == [step != LEFT_OUT for step in range(STEPS)], case


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_masked_batch_moves_nothing_but_the_schedule(tmp_path: Path, world_size: int) -> None:
    for rank in run_ranks("tests.engine.test_skipped_steps:masked_runs", world_size, folder=str(tmp_path)):
        for case, found in rank.items():
            states = found["got"]["states"]
            check(found["want"], found["got"], case)
            assert found["resumed"]["states"] == states[LEFT_OUT + 1 :], case
            assert found["resumed"]["skipped"] == 1, case


def test_whatever_leaves_nothing_to_train_is_such_a_step() -> None:
    for rank in run_ranks("tests.engine.test_skipped_steps:kinds_of_nothing", 2):
        assert len(rank) == 12
        for case, found in rank.items():
            assert found["losses"][LEFT_OUT] == 0.0 and all(found["losses"][:LEFT_OUT]), case
            assert found["states"][LEFT_OUT] == found["states"][LEFT_OUT - 1] != found["states"][LEFT_OUT + 1], case
            assert (found["skipped"], found["steps"]) == (1, STEPS), case


@pytest.fixture(scope="module")
def not_finite(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("nonfinite"))
    result: dict[str, Any] = run_ranks("tests.engine.test_skipped_steps:nonfinite", 2, folder=folder)[0]
    return result


def test_a_skipped_step_that_is_not_finite_moves_nothing_but_the_schedule(not_finite: dict[str, Any]) -> None:
    for case, found in not_finite.items():
        if case != "said":
            check(found["want"], found["got"], case, math.nan)


def test_a_step_that_is_not_finite_stops_before_it_changes_anything(not_finite: dict[str, Any]) -> None:
    said = not_finite["said"]
    assert said["stop"][0].startswith("step 3: the weighted loss of the global batch is not finite; nothing was saved")
    assert "nonfinite: skip" in said["stop"][0] and said["stop"][1:] == [True, LEFT_OUT]
    assert said["gradient"][0].startswith("step 3: the gradient of the global batch is not finite; nothing was saved")
    assert said["gradient"][1:] == [True, LEFT_OUT]
    assert "step 3: " in said["bound"][0] and "2 steps before it were skipped" in said["bound"][0]
    assert said["bound"][1:] == [True, 2]
    assert said["resumed"] == said["bound"], "a resume counts on"


def test_what_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    (said,) = run_ranks("tests.engine.test_skipped_steps:refused_saves", 1, folder=str(tmp_path))
    for what, name in (
        ("weight", "the weight model.embed_tokens.weight is"),
        ("moment", "the optimizer's exp_avg is"),
    ):
        message, newest = said[what]
        assert message.startswith(f"/{what}/checkpoint-2: not saved after step 2: {name} no longer finite"), message
        assert newest == "checkpoint-1"
