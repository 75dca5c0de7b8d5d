"""One optimizer step is the same for every split of its global batch, and is that of the formula."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dataflex
from dataflex.forward import fused
from tests import tiny_engine as tiny
from tests.distributed import run_ranks

BATCH = 8
RATE = 1024.0
SPLITS = {1: [(8, 1), (4, 2), (2, 4)], 2: [(4, 1), (2, 2), (1, 4)]}
LOSSES = ["static", "mean", "sum_weights", "tokens"]
EVERY = list(product(product(("full", "lora"), (0, 1, 2, 3)), LOSSES))
USUAL = {
    1: list(product([("full", 0)], LOSSES)),
    2: [
        *product([("full", 3)], LOSSES),
        *product([("full", 1), ("full", 2), ("lora", 0), ("lora", 1), ("lora", 3)], ["sum_weights"]),
    ],
}


def pool(loss: str) -> list[dict[str, Any]]:
    """One global batch of samples of unequal length; weighted ones for every loss but ``static``."""
    made: list[dict[str, Any]] = tiny.samples(BATCH, seed=3, shortest=4, longest=40)
    if loss != "static":
        for i, sample in enumerate(made):
            sample["sample_weight"] = [0.0, 0.25, 1.0, 3.0, 0.5, 1.5, 2.0, 0.1][i]
    return made


def formula(net: torch.nn.Module, samples: list[dict[str, Any]], loss: str) -> torch.Tensor:
    """The loss of design section 7 over the whole batch, sample by sample."""
    total = torch.zeros((), dtype=torch.float64)
    tokens, weights = 0, 0.0
    for sample in samples:
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])
        logits = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
        counted = int((labels[1:] != -100).sum())
        weight = sample.get("sample_weight", 1.0)
        by_token = loss in ("static", "tokens")
        total = total + weight * F.cross_entropy(logits, labels[1:], reduction="sum" if by_token else "mean")
        tokens, weights = tokens + counted, weights + weight
    return total / {"static": tokens, "tokens": tokens, "mean": len(samples), "sum_weights": weights}[loss]


def net_of(kind: str) -> Any:
    return tiny.model(kind, targets=tiny.FEW_TARGETS, num_hidden_layers=1)


def gradient_of_formula(kind: str, loss: str) -> tuple[torch.Tensor, float]:
    """Gradient of all trained parameters in one vector, and the loss; float64."""
    net = net_of(kind).double()
    value = formula(net, pool(loss), loss)
    trained = [p for p in net.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, trained)]), float(value.detach())


def trained(engine: Any) -> torch.Tensor:
    """All trained parameters in one vector, float64; a collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    full = [safe_get_full_fp32_param(p) for p in parameters]
    values = [p if f is None else f for p, f in zip(parameters, full, strict=True)]
    return torch.cat([v.detach().double().flatten() for v in values])


def gradient_of_engine(kind: str, stage: int, loss: str, micro: int, accumulation: int) -> tuple[torch.Tensor, float]:
    """What one step of plain SGD moves the parameters by, over its rate; and the step's loss."""
    engine = dataflex.initialize(
        model=net_of(kind),
        config=tiny.ds_config(
            stage,
            micro_batch=micro,
            accumulation=accumulation,
            optimizer={"type": "SGD", "params": {"lr": RATE}},
            zero_allow_untested_optimizer=True,
            gradient_clipping=0.0,
        ),
        dataflex={"train_step": 1, "fused_head": "on" if accumulation > 1 else "off"}
        | ({} if loss == "static" else {"weight_normalization": loss}),
        train_dataset=pool(loss),
        tokenizer=tiny.PadZero(),
    )
    before = trained(engine)
    (value,) = [engine.training_step(batch) for batch in engine.batches()]
    return (before - trained(engine)) / RATE, value


def errors(cases: list[Any], splits: list[Any]) -> dict[str, tuple[float, float]]:
    """Relative error of the gradient and of the loss, of each case in each split.

    Those of several micro-batches make no logits.
    """
    found = {}
    fused.CHUNK_TOKENS = {"cpu": 16, "cuda": 16}
    for kind, loss in dict.fromkeys((kind, loss) for (kind, _), loss in cases):
        want, want_loss = gradient_of_formula(kind, loss)
        for stage in [stage for (k, stage), wanted in cases if (k, wanted) == (kind, loss)]:
            for micro, accumulation in splits:
                got, got_loss = gradient_of_engine(kind, stage, loss, micro, accumulation)
                error = float((got - want).norm() / want.norm())
                found[f"{kind} zero{stage} {loss} {micro}x{accumulation}"] = (error, abs(got_loss / want_loss - 1))
    return found


def check(world_size: int, cases: list[tuple[tuple[str, int], str]]) -> None:
    for rank in run_ranks("tests.engine.test_split:errors", world_size, cases=cases, splits=SPLITS[world_size]):
        assert len(rank) == len(cases) * len(SPLITS[world_size])
        wrong = {case: error for case, error in rank.items() if max(error) > 1e-6}
        assert not wrong, wrong


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_split_takes_the_step_of_the_formula(world_size: int) -> None:
    check(world_size, USUAL[world_size])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_split_under_every_stage(world_size: int) -> None:
    check(world_size, EVERY)
