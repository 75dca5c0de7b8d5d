"""Runs without logits are those with them: training, every scoring pass and evaluation, under every ZeRO stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import dataflex
from dataflex.core.hook import Hook, Weigher
from dataflex.data.pool import Pool
from dataflex.forward import fused as rule
from dataflex.forward.fused import FusedHead
from dataflex.forward.head import find_head
from dataflex.scoring.checks import self_check
from dataflex.scoring.gradients.exact import exact_dots, mean_directions
from dataflex.scoring.gradients.spec import FeatureSpec
from dataflex.train.trainer.training_head import training_head
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.distributed import run_ranks
from tests.forward import models
from tests.forward.pairs import every_pair

POOL = tiny.samples(7, seed=5)
# kind of model, ZeRO stage and what is offloaded, dtype, activation checkpointing
FEW = [
    ("full", (0, ""), "float32", None),
    ("tied", (3, ""), "float32", "non-reentrant"),
]
KINDS = ("full", "tied", "lora", "lora head", "saved head")
STAGES = tuple((stage, "") for stage in range(4)) + tuple((stage, "optimizer") for stage in (1, 2, 3))
PAIRS = every_pair(
    (KINDS, (*STAGES, (3, "optimizer param")), ("float32", "bfloat16"), (None, "non-reentrant", "reentrant"))
)


def net_of(kind: str, dtype: torch.dtype) -> Any:
    if kind in ("full", "lora"):
        return tiny.model(kind, dtype, num_hidden_layers=1)
    if kind == "tied":
        return tiny.model("full", dtype, tie_word_embeddings=True, num_hidden_layers=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return models.adapted(tiny.model("full"), kind).to(dtype)


def engine_of(case: Any, mode: str) -> Any:
    kind, (stage, offload), dtype, checkpointing = case
    net = net_of(kind, getattr(torch, dtype))
    tiny.checkpoint_activations(net, checkpointing)
    config = tiny.ds_config(stage, micro_batch=2, accumulation=2)
    config["zero_optimization"] |= {f"offload_{what}": {"device": "cpu"} for what in offload.split()}
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
    return dataflex.initialize(
        model=net,
        config=config,
        dataflex={"train_step": 4, "scoring_batch_tokens": 60, "fused_head": mode},
        train_dataset=tiny.samples(40, seed=9),
        eval_dataset=tiny.samples(5, seed=4),
        tokenizer=tiny.PadZero(),
    )


def figures(case: Any, mode: str) -> dict[str, list[float]]:
    """What a run computes: losses of steps, an evaluation, features, exact scores, a step after them."""
    engine = engine_of(case, mode)
    for forward in (engine._loop.stepper._losses, engine.scorer.forward):
        assert (forward.fused is None) == (mode == "off") and not forward.keeps_logits
    batches = engine.batches()
    losses = [engine.training_step(next(batches)) for _ in range(3)]
    how = {"proj_dim": 256, "seed": 11}
    features = [engine.scorer.gradient_features(POOL, adam=adam, **how) for adam in (None, "adam_less")]
    directions = mean_directions(engine.scorer, POOL[:3], np.zeros(3))
    dots, square = exact_dots(engine.scorer, POOL, directions, adam="adam")
    found = {"evaluation": np.array(list(engine.evaluate().values())), "dots": dots, "square": square}
    found |= {"plain features": features[0], "adam features": features[1]}
    if mode == "on" and case[0] in ("tied", "lora head") and case[1][0] == 3:
        spec = FeatureSpec(adam="adam_less", proj_dim=64)
        verdicts = self_check.check_scoring(engine.scorer, POOL, np.arange(2), spec)
        assert all(verdict.ok for verdict in verdicts), [verdict.line for verdict in verdicts]
    found["losses"] = np.array([*losses, engine.training_step(next(batches))])
    return {name: np.ravel(value).tolist() for name, value in found.items()}


def both(cases: list[Any]) -> list[Any]:
    rule.CHUNK_TOKENS = {"cpu": 16, "cuda": 16}
    return [[case, *(figures(case, mode) for mode in ("off", "on"))] for case in cases]


@pytest.mark.parametrize(
    "cases",
    [FEW, *(pytest.param([row for row in PAIRS if row[0] == kind], marks=pytest.mark.slow) for kind in KINDS)],
    ids=["few", *KINDS],
)
def test_runs_with_and_without_logits_agree(cases: list[Any]) -> None:
    for rank in run_ranks("tests.forward.test_fused_runs:both", 2, cases=cases):
        assert len(rank) == len(cases)
        for case, plain, fused in rank:
            check(case, plain, fused)


def check(case: Any, plain: dict[str, list[float]], fused: dict[str, list[float]]) -> None:
    half = "bfloat16" in case
    assert set(plain) == set(fused)
    for name, want in plain.items():
        if name in ("losses", "evaluation"):
            np.testing.assert_allclose(fused[name], want, atol=2e-2 if half else 1e-5, err_msg=str(case))
            continue
        mine, theirs = np.array(fused[name]), np.array(want)
        apart = np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)
        room = (0.3 if "adam" in name else 0.1) if half else 1e-3
        assert apart < room, (case, name, apart)


class Reads(Hook):
    def on_losses(self, run: Any, micro: Any, losses: Any, outputs: Any) -> None:
        outputs.logits.sum()


class Weighs(Weigher):
    needs_logits = False  # type: ignore[assignment]

    def weigh(self, run: Any, micro: Any, losses: Any, outputs: Any) -> Any:
        return None


def test_hooks_that_may_read_logits_keep_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dataflex")
    head = FusedHead(find_head(tiny.model("full")))
    always = replace(head, always=True)
    assert training_head(always, [Hook(), Weighs()], 64) == replace(always, twice=True)
    assert "Weighs weighs by the losses, so the backward makes them again in chunks" in caplog.text
    assert training_head(always, [Hook()], 64) == always
    assert "its gradient is made together with the losses" in caplog.text
    assert training_head(head, [Weighs(), Reads()], 64) is None
    assert "training with them: Reads may read logits" in caplog.text
    with pytest.raises(UserError, match="fused_head: on: Reads may read logits"):
        training_head(always, [Reads()], 64)
    caplog.clear()
    assert training_head(head, [Hook()], 64) == head
    assert "training makes its losses with logits: too few" in caplog.text
    assert training_head(None, [Reads()], 64) is None


def test_small_runs_make_logits_unless_told_not_to_and_token_losses_are_the_same() -> None:
    (found,) = run_ranks("tests.forward.test_fused_runs:alone", 1)
    made = {mode: made for mode, (made, _) in found.items()}
    assert made == {"auto": False, "off": False, "on": True}
    for plain, fused in zip(found["off"][1], found["on"][1], strict=True):
        np.testing.assert_allclose(fused, plain, atol=1e-6)


def alone() -> dict[str, Any]:
    """Whether scoring does without logits, and the token losses of a pool, in each mode."""
    rule.CHUNK_TOKENS = {"cpu": 5, "cuda": 5}
    found, pool = {}, Pool.from_datasets(POOL)
    for mode in ("auto", "off", "on"):
        scorer = engine_of(FEW[0], mode).scorer
        kept: list[Any] = []
        scorer.stream_losses(pool, np.arange(len(pool)), lambda _, losses, __, to=kept: to.append(losses.token_loss))
        found[mode] = scorer.forward.fused is not None, [t.tolist() for t in kept]
    return found
