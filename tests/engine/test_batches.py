"""The micro-batches of a plan by hand: whose samples they hold, from which step on, and with which weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.core.plan import Plan
from dataflex.core.weights import NO_WEIGHTS, StaticWeights
from dataflex.data.encoding.collate import Collator
from dataflex.data.pool import Pool
from dataflex.engine.steps.batches import BatchSource, StepBatch

SIZE, MICRO, ACCUMULATION, WORLD, STEPS = 24, 2, 2, 2, 3
BATCH = MICRO * ACCUMULATION * WORLD
IDS = np.random.default_rng(0).permutation(SIZE)
PROBABILITIES = np.linspace(0.01, 0.09, SIZE)


def batches(rank: int, first: int, weights: StaticWeights = NO_WEIGHTS) -> list[StepBatch]:
    """Sample i has the tokens 100 + i, 1, 2 and the token weights 0.5, i, 3."""
    samples = [
        {"input_ids": [100 + i, 1, 2], "labels": [100 + i, 1, 2], "token_weight": [0.5, float(i), 3.0]}
        for i in range(SIZE)
    ]
    run: Any = SimpleNamespace(
        pool=Pool.from_datasets(samples),
        micro_batch=MICRO,
        accumulation=ACCUMULATION,
        world_size=WORLD,
        rank=rank,
        global_batch=BATCH,
    )
    source = BatchSource(run, Collator(0), torch.device("cpu"), weights=weights)
    return list(source.batches(Plan(IDS, PROBABILITIES), first, STEPS))


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_its_samples_of_each_step(rank: int, first: int) -> None:
    found = batches(rank, first)
    assert len(found) == STEPS - first
    for step, batch in enumerate(found, start=first):
        window = IDS[step * BATCH : (step + 1) * BATCH]
        assert batch.sample_ids.tolist() == window.tolist()
        for k, micro in enumerate(batch.micro_batches):
            mine = window[(k * WORLD + rank) * MICRO :][:MICRO]
            assert micro.sample_ids.tolist() == mine.tolist()
            assert micro.inputs["input_ids"][:, 0].tolist() == (100 + mine).tolist()


def test_weights_are_of_the_samples_draws_and_labels() -> None:
    loss = np.arange(SIZE, dtype=np.float64)
    weights = StaticWeights(loss, corrected=True, tokens=True)
    (batch,) = batches(1, 2, weights)
    for k, micro in enumerate(batch.micro_batches):
        at = 2 * BATCH + (k * WORLD + 1) * MICRO + np.arange(MICRO)
        np.testing.assert_allclose(micro.probabilities, PROBABILITIES[at])
        assert micro.weights is not None and micro.token_weights is not None
        np.testing.assert_allclose(micro.weights, loss[IDS[at]] / (SIZE * PROBABILITIES[at]), rtol=1e-6)
        assert micro.counts.tolist() == [2, 2]
        # Beside the labels: the weight of a token stands where it is predicted.
        assert micro.token_weights.tolist() == [w for i in IDS[at] for w in (float(i), 3.0, 0.0)]
