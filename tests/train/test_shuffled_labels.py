"""Planted: a language model is trained while 30% of the rows have another row's labels."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml

import dataflex
from dataflex.data.encoding.collate import Collator
from tests import tiny_engine as tiny
from tests.distributed import run_ranks
from tests.train.weighting_runs import Watch

WORDS, LENGTH, ROWS, WRONG, STEPS, BATCH = 40, 16, 480, 0.3, 90, 16
STRATEGIES = ("quadratic", "linupper")


def sentences(seed: int) -> tuple[list[dict[str, list[int]]], list[bool]]:
    """Sentences in which a word mostly says the next, in some rows nearly always and in others seldom.

    Returned with which rows are wrong: their labels are another row's.
    """
    draw = np.random.default_rng(seed)
    follows = draw.permutation(WORDS)
    rows = []
    for strictness in draw.uniform(0.3, 1.0, ROWS):
        words = [int(draw.integers(WORDS))]
        while len(words) < LENGTH:
            words.append(int(follows[words[-1]] if draw.random() < strictness else draw.integers(WORDS)))
        ids = [3 + w for w in words]
        rows.append({"input_ids": ids, "labels": ids})
    wrong = draw.random(ROWS) < WRONG
    moved = np.flatnonzero(wrong)
    labels = [rows[i]["labels"] for i in np.roll(moved, 1)]
    for i, others in zip(moved, labels, strict=True):
        rows[i] = rows[i] | {"labels": others}
    return rows, wrong.tolist()


def weight_of_wrong(strategy: str, folder: Path) -> float:
    """Mean weight of wrong rows over that of right ones, in the last third of the run."""
    rows, wrong = sentences(1)
    components = folder / f"{strategy}.yaml"
    params = {"strategy": strategy, "r_start": 0.4, "r_end": 0.4}
    components.write_text(yaml.safe_dump({"weighters": {"loss": {"name": "loss", "params": params}}}))
    watch = Watch()
    engine = dataflex.initialize(
        model=tiny.model("full"),
        config=tiny.ds_config(
            0, micro_batch=BATCH, optimizer={"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}}
        ),
        dataflex={
            "train_step": STEPS,
            "train_type": "dynamic_weight",
            "component_name": "loss",
            "components_cfg_file": str(components),
        },
        train_dataset=rows,
        data_collator=Collator(0),
        hooks=[watch],
    )
    for batch in engine.batches():
        engine.training_step(batch)
    late = [(wrong[i], w) for step in watch.weights[-STEPS // 3 :] for i, w in step.items()]
    return float(np.mean([w for bad, w in late if bad]) / np.mean([w for bad, w in late if not bad]))


def all_strategies() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return {strategy: weight_of_wrong(strategy, Path(folder)) for strategy in STRATEGIES}


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    (ratios,) = run_ranks("tests.train.test_shuffled_labels:all_strategies", 1)
    return dict(ratios)


def test_quadratic_lowers_the_weight_of_shuffled_labels(found: dict[str, float]) -> None:
    """Right rows are of every difficulty, and shuffled ones lie at the end of the range that it takes weight from."""
    assert found["quadratic"] < 0.6


def test_linupper_raises_it(found: dict[str, float]) -> None:
    assert found["linupper"] > 1.2
