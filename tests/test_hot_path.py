"""Dataflex's own frames in a training step and in scoring passes do not make the host wait for the device.

Without a GPU the calls are named that would wait on one: reading a tensor's numbers, a result whose size depends on
them, and a tensor of the host's own numbers, which is copied. With one, `tests/gpu` lets CUDA itself say so.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import dataflex
from dataflex.ops.known import counted_positions, values_of, with_count, with_values
from dataflex.scoring.gradients.exact import exact_dots, mean_directions
from tests import tiny_engine as tiny
from tests.distributed import run_ranks

PACKAGE = Path(dataflex.__file__).parent
READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "is_nonzero"}
SIZES = {"nonzero", "unique", "unique_consecutive", "masked_select", "argwhere"}
COPIES = {"tensor", "as_tensor", "new_tensor", "from_numpy"}
# What is left, by file and function: why, and in what.
ALLOWED = {
    ("engine/steps/loop.py", "_agree"): "the one read of a step",
    ("scoring/scorer.py", "keep"): "the one copy of a batch's results",
    ("scoring/gradients/exact.py", "keep"): "the one copy of a batch's results",
    ("forward/split.py", "split_batch"): "reads the collated batch, which is the host's",
    ("scoring/gradients/taps.py", "start"): "a tensor for the host, of numbers that it knows",
    ("ops/projection/segments.py", "check_segments"): "only on the CPU",
    ("ops/losses/loss_options.py", "check_loss"): "only on the CPU",
    ("ops/losses/loss_options.py", "_check_labels"): "only on the CPU",
    ("ops/projection/project.py", "project_rows_"): "only on the CPU",
    ("ops/known.py", "moved"): "copies from pinned memory",
    ("forward/head.py", "_probe"): "once a process",
    ("data/encoding/collate.py", "_tensor"): "collates on the host",
    ("engine/steps/batches.py", "_micro"): "the host's own numbers, which `moved` copies",
    ("train/trainer/weight_trainer.py", "weigh"): "the host's own numbers, which `moved` copies",
    ("scoring/scorer.py", "run_backward"): "the host's own numbers, which `moved` copies",
    ("scoring/passes/embed_pass.py", "embeddings"): "the host's own numbers, which `moved` copies",
    ("scoring/gather.py", "merge"): "once a pass",
    ("train/trainer/weight_trainer.py", "on_host"): "once a logged step",
    ("train/trainer/weight_trainer.py", "on_step_end"): "once a logged step",
    ("scoring/gradients/head_parts.py", "with_lookups"): "how many ids of a tied embedding lie in a block of its head",
    ("scoring/gradients/experts.py", "run_experts"): "how many tokens each expert has, which its products are cut by",
}


class Waits(TorchFunctionMode):
    """Counts what would wait, by the innermost frame where that is dataflex's own."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str, str]] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        index = name == "__getitem__" and torch.is_tensor(args[1]) and args[1].dtype is torch.bool
        if name in READS | SIZES | COPIES or index:
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename and frame.f_back is not None:
                frame = frame.f_back
            self._note(frame, name)
        return function(*args, **(kwargs or {}))

    def _note(self, frame: FrameType, name: str) -> None:
        place = Path(frame.f_code.co_filename)
        if PACKAGE in place.parents:
            self.found[str(place.relative_to(PACKAGE)), frame.f_code.co_name, name] += 1


def waits_of(kind: str, component: str, fused: str) -> list[Any]:
    """Of a training step and of each kind of scoring pass, after one of each."""
    settings = {"train_step": 4, "scoring_batch_tokens": 60, "logging_steps": 100}
    if component:
        settings |= {"train_type": "dynamic_weight", "component_name": component, "warmup_step": 0}
    engine = dataflex.initialize(
        model=tiny.model(kind, **({"tie_word_embeddings": True} if kind == "full" else {})),
        config=tiny.ds_config(0, micro_batch=4),
        dataflex=settings | ({"fused_head": fused} if fused else {}),
        train_dataset=tiny.samples(40, seed=9),
        tokenizer=tiny.PadZero(),
    )
    batches, pool, scorer = engine.batches(), tiny.samples(6, seed=5), engine.scorer
    engine.training_step(next(batches))
    batch = next(batches)

    def passes() -> None:
        scorer.losses(pool)
        scorer.gradient_features(pool, proj_dim=64, seed=1, adam="adam_less")
        exact_dots(scorer, pool, mean_directions(scorer, pool, np.zeros(6)), adam="adam_less")

    passes()
    with Waits() as waits:
        engine.training_step(batch)
        passes()
    return [[*place, times] for place, times in waits.found.items()]


@pytest.mark.parametrize(
    ("kind", "component", "fused"), [("full", "loss", "off"), ("lora", "", "on"), ("full", "", "on"), ("moe", "", "")]
)
def test_nothing_of_dataflex_waits_but_what_is_named(kind: str, component: str, fused: str) -> None:
    (found,) = run_ranks("tests.test_hot_path:waits_of", 1, kind=kind, component=component, fused=fused)
    unnamed = [wait for wait in found if (wait[0], wait[1]) not in ALLOWED]
    assert not unnamed, unnamed
    (reads,) = [times for file, _, name, times in found if file == "engine/steps/loop.py"]
    assert reads == 1, "one combined read per step"


def test_a_wait_of_dataflex_would_be_seen() -> None:
    with Waits() as waits:
        counted_positions(torch.tensor([1, -100, 2]))
        values_of(torch.tensor([1, 2]))
    assert [(file, function) for file, function, _ in waits.found] == [
        ("ops/known.py", "counted_positions"),
        ("ops/known.py", "values_of"),
    ]


def test_what_the_host_knows_is_not_asked_for_again() -> None:
    labels = with_count(torch.tensor([1, -100, 2, -100, 0]), 3)
    bounds = with_values(torch.tensor([0, 2, 5]), [0, 2, 5])
    with Waits() as waits:
        found, values = counted_positions(labels), values_of(bounds)
    assert found.tolist() == [0, 2, 4] and values == [0, 2, 5] and not waits.found
    assert counted_positions(labels, 0).tolist() == [0, 1, 2, 3], "another index is looked up"
