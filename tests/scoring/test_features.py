"""Gradient features against single-sample float64 autograd, and what a scoring pass leaves behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import dataflex
from dataflex.ops import Projection, Sums, Transform, project_dense_, project_per_sample_grad_, tensor_id
from dataflex.scoring.gradients import layer_state
from dataflex.scoring.gradients.exact import exact_dots
from tests import families
from tests import tiny_engine as tiny
from tests.distributed import run_ranks

PROJ_DIM = 256
SEED = 11
POOL = 11
CASES = [
    (kind, stage, ckpt)
    for kind in ("lora", "full")
    for stage in (0, 1, 2, 3)
    for ckpt in (None, "reentrant", "non-reentrant")
    if ckpt is None or stage in (0, 3)
]
FEW = [
    *(("lora", 0, None), ("full", 1, None), ("lora", 2, None)),
    *(("full", 3, "reentrant"), ("lora", 3, "non-reentrant"), ("full", 0, "non-reentrant")),
]
TRAINED = [(stage, *how) for stage in (0, 1, 2, 3) for how in (("lora", "reentrant"), ("full", None))]


def autograd_features(net: torch.nn.Module, pool: list[Any], adam: Any = None) -> torch.Tensor:
    """Features [n, PROJ_DIM] in float64 from one backward per sample."""
    net = net.double().eval()
    out = torch.zeros(len(pool), PROJ_DIM, dtype=torch.float64)
    for row, sample in enumerate(pool):
        net.zero_grad(set_to_none=True)
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])
        logits = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]).backward()
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                _add(out[row : row + 1], name, parameter.grad, adam)
    return out


def _add(out: torch.Tensor, name: str, grad: torch.Tensor, adam: Any) -> None:
    """Project one whole gradient: as the product with an identity, so that no tap is involved."""
    moments = {} if adam is None else {"exp_avg": adam[0][name][0].double(), "exp_avg_sq": adam[0][name][1].double()}
    of = Projection(tensor_id(name), SEED, Transform() if adam is None else adam[1], **moments)
    if grad.dim() == 1:
        project_dense_(Sums(out), grad[None], of)
    else:
        rows = torch.eye(grad.shape[0], dtype=torch.float64)
        project_per_sample_grad_(Sums(out), rows, grad, torch.tensor([0, len(rows)]), of)


def ranks_features(kind: str, stage: int, ckpt: str | None, steps: int, offload: str = "") -> list[list[float]]:
    """On every rank: train ``steps``, score the pool with Adam's moments, compare with autograd.

    offload: what lies in the host's memory, of ``optimizer`` and ``param``.
    """
    net = tiny.model(kind)
    tiny.checkpoint_activations(net, ckpt)
    world = torch.distributed.get_world_size()
    config = tiny.ds_config(stage, micro_batch=4 // world, accumulation=2)
    config["zero_optimization"] |= {f"offload_{what}": {"device": "cpu"} for what in offload.split()}
    engine = dataflex.initialize(
        model=net,
        config=config,
        dataflex={"train_step": 8, "scoring_batch_tokens": 60},
        train_dataset=tiny.samples(40, seed=9),
        tokenizer=tiny.PadZero(),
    )
    batches = engine.batches()
    for _ in range(steps):
        engine.training_step(next(batches))
    pool = tiny.samples(POOL, seed=5)
    how = {"proj_dim": PROJ_DIM, "seed": SEED}
    plain = engine.scorer.gradient_features(pool, **how)
    adam = engine.scorer.gradient_features(pool, adam="adam_less", **how)
    reference, moments = _reference(engine, kind)
    return [
        _error(plain, autograd_features(reference, pool)),
        _error(adam, autograd_features(reference, pool, moments)),
    ]


def _reference(engine: Any, kind: str) -> tuple[torch.nn.Module, Any]:
    """A fresh model with the engine's present weights, and the moments of its optimizer."""
    from deepspeed.utils import safe_get_full_fp32_param

    from dataflex.engine.optimizer_state import read_moments

    fresh = tiny.model(kind)
    trained = [n for n, p in fresh.named_parameters() if p.requires_grad]
    moments, constants = read_moments(engine.engine, trained)
    moments = dict(moments)
    now = dict(engine.module.named_parameters())
    for name, parameter in fresh.named_parameters():
        if parameter.requires_grad:
            full = safe_get_full_fp32_param(now[name])
            value = now[name] if full is None else full
            parameter.data.copy_(value.detach().reshape(parameter.shape))
    form = Transform("adam_less", constants.beta1, constants.beta2, constants.eps, constants.step)
    return fresh, (moments, form)


def _error(features: np.ndarray, exact: torch.Tensor) -> float:
    """Largest relative error of a sample's feature."""
    difference = torch.from_numpy(features).double() - exact
    return float((difference.norm(dim=1) / exact.norm(dim=1)).max())


def all_cases(cases: list[Any], kept_bytes: int = 1 << 30) -> dict[str, list[float]]:
    """Several cases in one process group: starting one costs more than a case."""
    layer_state.KEPT_BYTES = kept_bytes
    return {f"{c[:3]} {c[3:]}": ranks_features(*c[:3], 2, *c[3:]) for c in cases}


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [(2, FEW), (1, FEW[-3:]), *(pytest.param(world, CASES, marks=pytest.mark.slow) for world in (1, 2))],
)
def test_features_equal_float64_autograd(world_size: int, cases: list[Any]) -> None:
    for errors in run_ranks("tests.scoring.test_features:all_cases", world_size, cases=cases):
        assert len(errors) == len(cases)
        for case, (plain, adam) in errors.items():
            assert plain < 1e-5, (case, plain)
            assert adam < 1e-5, (case, adam)


OFFLOADED = [
    ("full", 1, None, "optimizer"),
    ("lora", 2, None, "optimizer"),
    ("full", 3, "non-reentrant", "optimizer param"),
    ("lora", 3, None, "param"),
]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_features_are_exact_where_optimizer_and_parameters_are_offloaded(world_size: int) -> None:
    """And where Adam's moments are gathered anew for every layer of every batch."""
    for errors in run_ranks("tests.scoring.test_features:all_cases", world_size, cases=OFFLOADED, kept_bytes=0):
        assert len(errors) == len(OFFLOADED)
        assert all(max(pair) < 1e-5 for pair in errors.values()), errors


def train_with_and_without(stage: int, kind: str, ckpt: str | None) -> list[Any]:
    """Losses and parameter hash of a run, with scoring in the middle of it and without."""
    results = []
    for scoring in (False, True):
        net = tiny.model(kind, targets=tiny.FEW_TARGETS)
        tiny.checkpoint_activations(net, ckpt)
        engine = dataflex.initialize(
            model=net,
            config=tiny.ds_config(stage, accumulation=2),
            dataflex={"train_step": 5},
            train_dataset=tiny.samples(40, seed=9),
            tokenizer=tiny.PadZero(),
        )
        losses = []
        for batch in engine.batches():
            if scoring and engine.run.step in (0, 2, 3):
                pool = tiny.samples(7, seed=5)
                engine.scorer.gradient_features(pool, proj_dim=64, seed=1, adam="adam_less")
                engine.scorer.losses(pool)
            losses.append(engine.training_step(batch))
        results.append([losses, tiny.parameter_hash(engine)])
    return results


def both_ways(cases: list[Any]) -> list[Any]:
    return [[*case, *train_with_and_without(*case)] for case in cases]


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [(2, TRAINED[-3:]), *(pytest.param(w, TRAINED, marks=pytest.mark.slow) for w in (1, 2))],
)
def test_scoring_leaves_training_bit_identical(world_size: int, cases: list[Any]) -> None:
    for rank in run_ranks("tests.scoring.test_features:both_ways", world_size, cases=cases):
        assert len(rank) == len(cases)
        for stage, kind, ckpt, without, with_scoring in rank:
            assert without == with_scoring, (stage, kind, ckpt)


def gathered_in_the_last_step(scoring: bool) -> int:
    """How many parameters ZeRO-3 gathers in the last of four steps, with a pass before the first or without."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    engine = dataflex.initialize(
        model=tiny.model("full"),
        config=tiny.ds_config(3),
        dataflex={"train_step": 4},
        train_dataset=tiny.samples(40, seed=9),
        tokenizer=tiny.PadZero(),
    )
    if scoring:
        engine.scorer.losses(tiny.samples(40, seed=5))
    name = "_PartitionedParameterCoordinator__all_gather_params_"
    gather, gathered = getattr(Coordinator, name), []

    def counted(self: Any, params: Any, *rest: Any, **more: Any) -> None:
        gathered[-1] += sum(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in params)
        gather(self, params, *rest, **more)

    setattr(Coordinator, name, counted)
    try:
        for batch in engine.batches():
            gathered.append(0)
            engine.training_step(batch)
    finally:
        setattr(Coordinator, name, gather)
    return gathered[-1]


def gathered_either_way() -> list[int]:
    return [gathered_in_the_last_step(scoring) for scoring in (False, True)]


def test_scoring_first_leaves_zero3s_prefetching_as_it_was() -> None:
    """DeepSpeed would go on by the scoring pass's plan and gather every parameter twice a step."""
    ((never, first),) = run_ranks("tests.scoring.test_features:gathered_either_way", 1)
    assert first == never > 0


def sinks_of(ckpt: str | None, stage: int) -> float:
    """Largest error of the norms of gpt-oss's samples, whose attention sinks are covered by running a module again."""
    net, exact = families.model("gpt_oss"), families.model("gpt_oss").double().eval()
    exact.set_experts_implementation("eager")
    ids = [[i % families.VOCABULARY for i in sample["input_ids"]] for sample in tiny.samples(7, seed=5, longest=12)]
    pool = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]
    truth = [sum(float(g.square().sum()) for g in families.sample_gradient(exact, sample).values()) for sample in pool]
    tiny.checkpoint_activations(net, ckpt)
    engine = dataflex.initialize(
        model=net,
        config=tiny.ds_config(stage),
        dataflex={"train_step": 2, "scoring_batch_tokens": 40},
        train_dataset=pool,
        tokenizer=tiny.PadZero(),
    )
    _, sqnorm = exact_dots(engine.scorer, pool, {}, adam=None)
    loss = engine.training_step(next(iter(engine.batches())))
    assert np.isfinite(loss)
    return float(np.abs(sqnorm / np.array(truth) - 1).max())


def all_sinks() -> list[float]:
    return [sinks_of(ckpt, stage) for ckpt in (None, "reentrant", "non-reentrant") for stage in (0, 3)]


def test_a_module_runs_again_under_zero3() -> None:
    for errors in run_ranks("tests.scoring.test_features:all_sinks", 2):
        assert len(errors) == 6 and max(errors) < 1e-5, errors
