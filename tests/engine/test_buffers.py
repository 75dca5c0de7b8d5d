"""A model with dropout and a buffer that training moves: scored without dropout, saved and resumed with both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dataflex
from dataflex.engine.folder.identity import saved_buffers, weights_identity
from tests import tiny_engine as tiny
from tests.distributed import run_ranks

STEPS, SAVE_AT = 4, 2
HOW: dict[str, Any] = {"proj_dim": 64, "seed": 1}


def model() -> Any:
    """A Llama whose last hidden states are multiplied by a saved buffer, which grows at each training forward."""
    net = tiny.model("full", attention_dropout=0.3)
    net.register_buffer("factor", torch.ones(()))
    net.register_buffer("passing", torch.ones(2), persistent=False)

    def scaled(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if net.training:
            with torch.no_grad():
                net.factor.mul_(1.25)
        return output * net.factor

    net.model.norm.register_forward_hook(scaled)
    return net


def build(stage: int) -> Any:
    world = torch.distributed.get_world_size()
    return dataflex.initialize(
        model=model(),
        config=tiny.ds_config(stage, micro_batch=4 // world, accumulation=2),
        dataflex={"train_step": STEPS, "scoring_batch_tokens": 60},
        train_dataset=tiny.samples(32, seed=9),
        eval_dataset=tiny.samples(5, seed=3, shortest=4, longest=30),
        tokenizer=tiny.PadZero(),
    )


def by_hand(engine: Any) -> float:
    """The evaluation in float64: every sample alone, without dropout, with the buffer as it is now."""
    import deepspeed

    net = model().double().eval()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        net.load_state_dict({n: t.double() for n, t in engine.module.state_dict().items()})
    loss, tokens = 0.0, 0
    for sample in engine.eval_pool.dataset:
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])
        with torch.no_grad():
            logits = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
        loss += float(F.cross_entropy(logits, labels[1:], reduction="sum"))
        tokens += int((labels[1:] != -100).sum())
    return loss / tokens


def looks(engine: Any) -> list[Any]:
    """All that evaluation and scoring say of the model as it is."""
    features = engine.scorer.gradient_features(engine.eval_pool, **HOW)
    return [engine.evaluate()["eval_loss"], engine.scorer.losses(engine.eval_pool)[0].tolist(), features.tolist()]


def trained(stage: int, folder: str) -> dict[str, Any]:
    engine, losses, factors = build(stage), [], []
    for batch in engine.batches():
        losses.append(engine.training_step(batch))
        factors.append(float(engine.module.factor))
        if engine.run.step == SAVE_AT:
            engine.save_checkpoint(Path(folder, str(stage)))
            state = torch.get_rng_state()
            seen, again = looks(engine), looks(engine)
            still = [torch.equal(state, torch.get_rng_state()), float(engine.module.factor), seen == again]
            hand = by_hand(engine)
            identities = [weights_identity(engine.engine, "x", False)]
            with torch.no_grad():
                engine.module.factor.add_(1.0)
            identities.append(weights_identity(engine.engine, "x", False))
            other = looks(engine)
            with torch.no_grad():
                engine.module.factor.sub_(1.0)
    fresh = build(stage)
    fresh.load_checkpoint(Path(folder, str(stage)))
    restored = float(fresh.module.factor)
    tail = [fresh.training_step(batch) for batch in fresh.batches()]
    return {
        "losses": losses, "factors": factors, "still": still, "eval": [seen[0], hand], "identities": identities,
        "moved": [seen, other], "restored": restored, "tail": tail, "tail factor": float(fresh.module.factor),
        "names": [name for name, _ in saved_buffers(engine.module)],
    }  # fmt: skip


def both(folder: str) -> dict[str, Any]:
    return {str(stage): trained(stage, folder) for stage in (0, 3)}


@pytest.fixture(scope="module", params=[1, 2])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("buffers")
    return run_ranks("tests.engine.test_buffers:both", request.param, folder=str(folder))


@pytest.mark.parametrize("stage", ["0", "3"])
def test_training_moves_the_buffer_and_nothing_else_does(stage: str, runs: list[dict[str, Any]]) -> None:
    for rank in runs:
        run = rank[stage]
        assert run["factors"] == pytest.approx([1.25 ** (2 * step) for step in range(1, STEPS + 1)])
        assert run["still"] == [True, pytest.approx(1.25 ** (2 * SAVE_AT)), True]


@pytest.mark.parametrize("stage", ["0", "3"])
def test_evaluation_is_without_dropout_and_with_the_buffer(stage: str, runs: list[dict[str, Any]]) -> None:
    for rank in runs:
        found, hand = rank[stage]["eval"]
        assert found == pytest.approx(hand, rel=1e-5)
        for before, after in zip(*rank[stage]["moved"], strict=True):
            assert before != after


@pytest.mark.parametrize("stage", ["0", "3"])
def test_a_resume_goes_on_with_the_buffer_and_the_dropout(stage: str, runs: list[dict[str, Any]]) -> None:
    for rank in runs:
        run = rank[stage]
        assert run["restored"] == pytest.approx(1.25 ** (2 * SAVE_AT))
        assert run["tail"] == run["losses"][SAVE_AT:] and run["tail factor"] == run["factors"][-1]


@pytest.mark.parametrize("stage", ["0", "3"])
def test_the_buffer_is_part_of_the_identity_of_the_weights(stage: str, runs: list[dict[str, Any]]) -> None:
    for rank in runs:
        before, after = rank[stage]["identities"]
        assert {name for name in before if before[name] != after[name]} == {"base weights"}
        assert before == runs[0][stage]["identities"][0]
        assert rank[stage]["names"] == ["factor"]
