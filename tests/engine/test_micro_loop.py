"""Forward, backward and step as calls of the user's own, and the wrapper taken for the DeepSpeed engine it holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dataflex
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.distributed import run_ranks

# Selection and weighting at once, with dropout in the model and three micro-batches a step.
FLEX: dict[str, Any] = {
    "train_type": ["dynamic_select", "dynamic_weight"],
    "component_name": {"select": "loss", "weight": "loss"},
    "warmup_step": 1,
    "update_step": 2,
    "update_times": 1,
    "seed": 3,
}


def start(stage: int, accumulation: int = 3) -> Any:
    torch.manual_seed(5 + torch.distributed.get_rank())
    return dataflex.initialize(
        model=tiny.model("full", attention_dropout=0.1, num_hidden_layers=1),
        config=tiny.ds_config(stage, accumulation=accumulation),
        dataflex=FLEX,
        train_dataset=tiny.samples(40, 1),
        eval_dataset=tiny.samples(4, 2),
        tokenizer=tiny.PadZero(),
    )


def both_loops(stage: int) -> dict[str, Any]:
    """The same run by `training_step` and by micro-batches: losses by step, weights at the end, micro-losses."""
    whole = start(stage)
    losses = [whole.training_step(batch) for batch in whole.batches()]
    own = start(stage)
    steps, micro_losses = [], []
    for micro in own.micro_batches():
        loss = own(micro)
        micro_losses.append(float(loss))
        own.backward(loss)
        own.step()
        if own.run.step > len(steps):
            steps.append(own.run.loss)
    return {
        "losses": [losses, steps],
        "hashes": [tiny.parameter_hash(whole), tiny.parameter_hash(own)],
        "micro": micro_losses,
        "counted": [own.global_steps, own.micro_steps],
    }


def like_deepspeeds() -> dict[str, Any]:
    """What a user's loop does with an engine."""
    import deepspeed

    engine = start(2)
    inputs = torch.randint(3, 200, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        looked_at = engine(input_ids=inputs).logits
    engine.client_note = 7
    engine.skipped_steps = 2
    found = {
        "shape": list(looked_at.shape),
        "forward": list(engine.forward(input_ids=inputs).logits.shape),
        "isinstance": [isinstance(engine, kind) for kind in (deepspeed.DeepSpeedEngine, torch.nn.Module)],
        "set on the engine": [engine.engine.client_note, engine.engine.skipped_steps],
        "dir": {"training_step", "save_16bit_model", "zero_grad"} <= set(dir(engine)),
        "parameters": len(list(engine.parameters())) == len(list(engine.module.parameters())),
        "modes": [engine.eval() or engine.module.training, engine.train() or engine.module.training],
        "repr": repr(engine).startswith("DataflexEngine(DeepSpeedEngine("),
    }
    del engine.client_note
    return found | {"deleted": not hasattr(engine.engine, "client_note")}


def said(action: Callable[[], Any]) -> str:
    try:
        return f"no error: {action()}"
    except UserError as error:
        return str(error)


def refusals() -> dict[str, str]:
    """What is said of a loop that would go past the plan, in the order of a user's mistakes."""
    inputs = torch.randint(3, 200, (2, 8))
    own = {"input_ids": inputs, "labels": inputs}
    engine = start(2)
    before = tiny.parameter_hash(engine)
    found = {
        "own batch": said(lambda: engine.backward(engine(**own).loss)),
        "own batch, torch": said(lambda: engine(**own).loss.backward()),
        "no backward": said(engine.step),
        "whole batch": said(lambda: engine(next(engine.batches()))),
        "compile": said(engine.compile),
        "batch size": said(lambda: engine.set_train_batch_size(24)),
    }
    micro = next(micros := engine.micro_batches())
    with torch.no_grad():
        found["no gradients"] = said(lambda: engine(micro))
    loss = engine(micro)
    found |= {
        "twice": said(lambda: engine(micro)),
        "no backward of it": said(engine.step),
        "evaluate inside": said(engine.evaluate),
        "save inside": said(lambda: engine.save_checkpoint("nowhere")),
        "scale": said(lambda: engine.backward(loss, scale_wrt_gas=False)),
        "with an auxiliary loss": said(lambda: engine.backward(loss + 0.1 * engine(**own).loss)),
        "backward twice": said(lambda: engine.backward(loss)),
        "not trained on": said(lambda: next(micros)),
    }
    return found | {"unchanged": str(before == tiny.parameter_hash(engine))}


def everything() -> dict[str, Any]:
    loops = {str(stage): both_loops(stage) for stage in (0, 2, 3)}
    return {"loops": loops, "engine": like_deepspeeds(), "refusals": refusals()}


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict[str, Any]]]:
    return {world: run_ranks("tests.engine.test_micro_loop:everything", world) for world in (1, 2)}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_users_own_calls_train_bit_for_bit_as_training_step(stage: int, world_size: int, results: Any) -> None:
    ranks = [rank["loops"][str(stage)] for rank in results[world_size]]
    for rank in ranks:
        assert rank["losses"][0] == rank["losses"][1] and len(rank["losses"][0]) == 3
        assert rank["hashes"][0] == rank["hashes"][1]
        assert rank["counted"] == [3, 9]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_mean_of_the_micro_losses_is_the_steps_loss(world_size: int, results: Any) -> None:
    ranks = [rank["loops"]["2"] for rank in results[world_size]]
    for step, loss in enumerate(ranks[0]["losses"][0]):
        micro = [value for rank in ranks for value in rank["micro"][3 * step : 3 * step + 3]]
        assert len(micro) == 3 * world_size
        assert sum(micro) / len(micro) == pytest.approx(loss, rel=1e-6)


def test_it_is_called_set_and_asked_for_like_the_engine(results: Any) -> None:
    assert results[1][0]["engine"] == {
        "shape": [2, 8, 259],
        "forward": [2, 8, 259],
        "isinstance": [True, True],
        "set on the engine": [7, 2],
        "dir": True,
        "parameters": True,
        "modes": [False, True],
        "repr": True,
        "deleted": True,
    }


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("own batch", r"engine.backward: this loss does not come from a micro-batch of dataflex's plan, so selection"),
        ("own batch, torch", r"backward: this loss does not come from a micro-batch of dataflex's plan"),
        ("no backward", r"engine.step: no backward of a micro-batch came before: for micro in engine.micro_batches"),
        ("whole batch", r"engine\(batch\): a batch of engine.batches\(\) is all micro-batches of a step"),
        ("compile", "engine.compile: not supported: compiled graphs bypass"),
        ("batch size", "engine.set_train_batch_size: not supported: the plan is made for"),
        ("no gradients", r"engine\(micro\): inside torch.no_grad, where no loss can be trained on"),
        ("twice", r"engine\(micro\): not the micro-batch at hand, or its loss was asked for before"),
        ("no backward of it", "engine.step: no backward of a micro-batch came before"),
        ("evaluate inside", "evaluate in the middle of step 1"),
        ("save inside", "save_checkpoint in the middle of step 1"),
        ("scale", "engine.backward: scale_wrt_gas=False is not supported"),
        ("with an auxiliary loss", "no error: "),
        ("backward twice", "engine.backward: this micro-batch had its backward"),
        ("not trained on", "a micro-batch was not trained on: write for micro"),
        ("unchanged", "True"),
    ],
)
def test_what_goes_past_the_plan_is_refused(case: str, text: str, world_size: int, results: Any) -> None:
    for rank in results[world_size]:
        assert re.match(text, rank["refusals"][case]), rank["refusals"][case]
        assert "\n" not in rank["refusals"][case]
