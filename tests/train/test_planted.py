"""Selectors find what was planted: the target's language, and the samples of high and of low loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import dataflex
from dataflex.train.selector.less_selector import LessSelector
from dataflex.train.selector.loss_selector import LossSelector
from tests import tiny_engine as tiny
from tests.distributed import run_ranks

WORDS = 40
OWN, OTHER = 24, 72
PICKS = 16


def language(count: int, seed: int, grammar: int) -> list[dict[str, list[int]]]:
    """Sentences over the same words in both languages; the grammar says which word follows which."""
    follows = np.random.default_rng(grammar).permutation(WORDS)
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        words = [int(draw.integers(WORDS))]
        while len(words) < 16:
            words.append(int(follows[words[-1]] if draw.random() < 0.9 else draw.integers(WORDS)))
        ids = [3 + w for w in words]
        made.append({"input_ids": ids, "labels": ids})
    return made


def initialize(pool: Any, **settings: Any) -> Any:
    return dataflex.initialize(
        model=tiny.model("full"),
        config=tiny.ds_config(
            2,
            micro_batch=4,
            optimizer={"type": "AdamW", "params": {"lr": 4e-3, "torch_adam": True}},
        ),
        dataflex=settings,
        train_dataset=pool,
        eval_dataset=settings.pop("target", None),
        tokenizer=tiny.PadZero(),
    )


def share_of_own(forms: list[list[str]]) -> dict[str, float]:
    """Share of the target's language among LESS's picks after a warm-up on the whole pool."""
    pool = {"other": language(OTHER, 1, grammar=1), "own": language(OWN, 2, grammar=2)}
    target = language(6, 3, grammar=2)
    engine = initialize(pool, train_step=20, target=target)
    for batch in engine.batches():
        engine.training_step(batch)
    shares = {}
    for gradient_type, adam_form in forms:
        selector = LessSelector(
            engine.run.pool,
            None,
            None,
            "",
            engine.scorer,
            engine.eval_pool,
            gradient_type=gradient_type,
            adam_form=adam_form,
            proj_dim=256,
        )
        picks = selector.select(engine.module, engine.run.step, PICKS)
        shares[f"{gradient_type} {adam_form}"] = float(np.mean(np.array(picks) >= OTHER))
    return shares


def share_of_unlearnt() -> dict[str, float]:
    """Share of the language that the model has not learnt among the picks for each focus."""
    known, unknown = language(OTHER, 1, grammar=1), language(OWN, 2, grammar=2)
    engine = initialize(known, train_step=25)
    for batch in engine.batches():
        engine.training_step(batch)
    pool = known + unknown
    shares = {}
    for focus in ("low", "high"):
        selector = LossSelector(
            pool, None, None, "", engine.scorer, focus=focus, focus_weight=1e9, quantiles=(0.25, 0.78)
        )
        picks = selector.select(engine.module, 0, PICKS)
        shares[focus] = float(np.mean(np.array(picks) >= OTHER))
        losses, _ = engine.scorer.losses(pool)
        assert selector.metric["loss"] == losses[picks].tolist()
    return shares


def everything(forms: list[list[str]]) -> list[dict[str, float]]:
    return [share_of_own(forms), share_of_unlearnt()]


FORMS = [["adam", "official"], ["adam", "optimizer"], ["sgd", "official"]]


@pytest.fixture(scope="module")
def shares() -> Any:
    return run_ranks("tests.train.test_planted:everything", 2, forms=FORMS)


@pytest.mark.parametrize("form", FORMS, ids=" ".join)
def test_less_prefers_the_targets_language(form: list[str], shares: Any) -> None:
    base_rate = OWN / (OWN + OTHER)
    for rank in shares:
        assert rank[0][" ".join(form)] >= 3 * base_rate


def test_the_loss_selector_finds_what_is_not_learnt(shares: Any) -> None:
    for rank in shares:
        assert rank[1]["high"] == 1.0
        assert rank[1]["low"] == 0.0
