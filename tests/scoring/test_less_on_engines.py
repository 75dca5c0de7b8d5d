"""LESS scores and the self-check on real engines: the same for every ZeRO stage and number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import dataflex
from dataflex.data.pool import Pool
from dataflex.scoring.checks import self_check
from dataflex.scoring.gradients import layer_state
from dataflex.scoring.gradients.directions import Directions
from dataflex.scoring.gradients.layers import LayerRule
from dataflex.scoring.gradients.spec import FeatureSpec
from dataflex.scoring.kept.sharded import ScoringPasses
from dataflex.train.selector.less_selector import LessSelector
from dataflex.utils import dist
from tests import families
from tests import tiny_engine as tiny
from tests.distributed import run_ranks

STAGES = {"lora": (1, 3), "full": (2, 3)}
CASES = [(kind, stage) for kind, stages in STAGES.items() for stage in stages]
SCORINGS = {"projected": {"proj_dim": 8192}, "exact": {"scoring": "exact"}}
TARGET = {"near": tiny.samples(3, seed=1), "far": tiny.samples(2, seed=2)}


def engine_of(kind: str, stage: int, dtype: torch.dtype = torch.float32, ckpt: str | None = None) -> Any:
    """An engine after two steps on 4 samples each."""
    if "experts" in kind:
        net: Any = families.model("mixtral", vocab_size=tiny.VOCABULARY)
    else:
        net = tiny.model(kind, dtype, targets=tiny.FEW_TARGETS)
    net = families.with_lora(net) if kind == "lora experts" else net
    tiny.checkpoint_activations(net, ckpt)
    world = torch.distributed.get_world_size()
    more = {"bf16": {"enabled": True}} if dtype is torch.bfloat16 else {}
    config = tiny.ds_config(stage, micro_batch=4 // world, **more)
    engine = dataflex.initialize(
        model=net,
        config=config,
        dataflex={"train_step": 8, "scoring_batch_tokens": 60},
        train_dataset=tiny.samples(40, seed=9),
        tokenizer=tiny.PadZero(),
    )
    batches = engine.batches()
    for _ in range(2):
        engine.training_step(next(batches))
    return engine


def scores_of(engine: Any, **params: Any) -> Any:
    """Scores of the whole pool, in shards of four samples."""
    pool = Pool.from_datasets(tiny.samples(9, seed=5))
    selector = LessSelector(pool, None, None, "", engine.scorer, Pool.from_datasets(TARGET), **params)
    selector.passes = ScoringPasses(shard_samples=4)
    found = dist.broadcast_object(selector.each())
    return found.max(axis=1)


def verdicts_of(engine: Any) -> list[str]:
    samples = tiny.samples(3, seed=3)
    rule = LayerRule.of(["last:1", "layers.0"], {"mlp": 2.0})
    found = []
    for spec in (FeatureSpec(adam="adam", proj_dim=64, layers=rule), FeatureSpec(adam="adam_less", proj_dim=0)):
        found += self_check.check_scoring(engine.scorer, samples, np.arange(3), spec)
    return [verdict.line for verdict in found]


def next_step(engine: Any) -> list[Any]:
    return [engine.training_step(next(engine.batches())), tiny.parameter_hash(engine)]


def all_scores(more: bool) -> dict[str, Any]:
    """Of each case, or of ZeRO-3 alone; with ``more`` of all, and of experts and bf16 too."""
    results: dict[str, Any] = {"parts": parts_of(torch.distributed.get_world_size())}
    for kind, stage in CASES if more else CASES[1::2]:  # one rank divides nothing: ZeRO-3 alone
        engine = engine_of(kind, stage, ckpt="reentrant" if kind == "lora" else "non-reentrant")
        for name, params in SCORINGS.items():
            results[f"{kind} {stage} {name}"] = scores_of(engine, **params).tolist()
        layer_state.KEPT_BYTES, kept = 0, layer_state.KEPT_BYTES
        results[f"{kind} {stage} in parts"] = scores_of(engine, scoring="exact").tolist()
        layer_state.KEPT_BYTES = kept
        results[f"{kind} {stage} checks"] = verdicts_of(engine) if stage == 3 else []
    if not more:
        return results
    for kind, ckpt in (("experts", "reentrant"), ("lora experts", None)):
        engine = engine_of(kind, 3, ckpt=ckpt)
        results[f"{kind} checks"] = verdicts_of(engine)
        results[f"{kind} steps"] = [next_step(e) for e in (engine, engine_of(kind, 3, ckpt=ckpt))]
    engine = engine_of("full", 3, torch.bfloat16)
    for name, params in SCORINGS.items():
        results[f"bf16 {name}"] = scores_of(engine, **params).tolist()
    results["bf16 checks"] = verdicts_of(engine)
    return results


def parts_of(world: int) -> list[Any]:
    """Bytes that a rank keeps of directions of seven numbers, and the ranks' sum of 1, 2, ... times (rank + 1)."""
    shape = torch.Size([7])
    parts = Directions({"w": shape}, 2, torch.device("cpu"), whole_bytes=0)
    for _ in range(2):
        total = parts.sum_for("w", 1)
        total += (torch.distributed.get_rank() + 1) * torch.arange(1.0, 8.0)
        parts.added("w", 1, total)
    parts.complete()
    return [parts._mine["w"].nbytes, parts["w"].tolist()]


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    """Of one rank, and of each of two."""
    target = "tests.scoring.test_less_on_engines:all_scores"
    return [rank for world in (1, 2) for rank in run_ranks(target, world, more=world == 2)]


def test_scores_are_the_same_everywhere(results: list[dict[str, Any]]) -> None:
    for kind in ("lora", "full"):
        for name in SCORINGS:
            places = [f"{kind} {stage} {name}" for stage in STAGES[kind]]
            found = np.array([rank[place] for rank in results for place in places if place in rank])
            assert len(found) == 5
            assert np.ptp(found[0]) > 0.01
            np.testing.assert_allclose(found, np.broadcast_to(found[0], found.shape), rtol=1e-4, atol=0)
        exact, projected = (np.array(results[0][f"{kind} 3 {name}"]) for name in ("exact", "projected"))
        assert np.abs(exact - projected).max() < 0.03
    for name in SCORINGS:
        bf16 = np.array([rank[f"bf16 {name}"] for rank in results[1:]])
        assert np.abs(bf16 - np.array(results[0][f"full 3 {name}"])).max() < 0.05


def test_large_directions_are_divided_over_the_ranks(results: list[dict[str, Any]]) -> None:
    for rank, (world, number) in zip(results, ((1, 0), (2, 0), (2, 1)), strict=True):
        kept, (nothing, total) = rank["parts"]
        assert kept == {1: 2 * 4 * 7, 2: 2 * 4 * 4}[world], number
        assert nothing == [0.0] * 7 and total == [2.0 * (1, 3)[world - 1] * i for i in range(1, 8)]
        for kind, stage in CASES if world == 2 else CASES[1::2]:
            whole, parts = (np.array(rank[f"{kind} {stage} {name}"]) for name in ("exact", "in parts"))
            np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_scoring_experts_leaves_training_bit_identical(results: list[dict[str, Any]]) -> None:
    """ZeRO-3 hangs hooks of its own on mixture blocks."""
    for rank in results[1:]:
        for kind in ("experts", "lora experts"):
            scored, never = rank[f"{kind} steps"]
            assert scored == never


def test_the_checks_pass(results: list[dict[str, Any]]) -> None:
    for rank in results:
        for name, lines in rank.items():
            if name.endswith("checks"):
                assert len(lines) == (10 if " 1 " not in name and " 2 " not in name else 0)
                assert all(line.startswith("ok") for line in lines), (name, lines)
