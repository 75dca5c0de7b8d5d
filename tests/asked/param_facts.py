"""Facts on built components: what each does with its params, on inputs whose right answer is written by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from dataflex.core.plan import generator
from dataflex.ops.losses.token_rules import TokenRows
from dataflex.scoring.decide.table import ArrayTable
from dataflex.train.selector.cluster_less_selector import Clusters

SIZES = {"one": 24, "two": 40, "three": 16}
POOL = 80
STEP = 7


def of_class(component: Any, name: str) -> Any:
    """Stands in for ``name`` of the component's module."""
    return mock.patch(f"{type(component).__module__}.{name}")


def factors(selector: Any) -> list[float]:
    """How much four of a Llama's parameters count, 0 for not at all."""
    names = [f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in ("mlp.up_proj", "self_attn.q_proj")]
    found = selector.spec.layers.factors(names)
    return [found.get(name, 0.0) for name in names]


def drawn(selector: Any) -> list[Any]:
    """Weights of samples 12, 13, 39 and 40 out of losses 0 to 79, the flag, and the next number of the draw."""
    with (
        mock.patch.object(selector, "scores", lambda: np.arange(POOL, dtype=np.float32)),
        of_class(selector, "weighted_draw") as draw,
    ):
        draw.return_value = np.arange(4)
        selector.select(None, STEP, 4)
    weights, named = draw.call_args.args[0], draw.call_args.kwargs
    return [weights[[12, 15, 16, 39, 40]].tolist(), named["replacement"], float(named["draw"].random())]


def voted(selector: Any) -> list[Any]:
    """Columns, and three picks of a planted table: ids, votes, whom they serve, and which sample of the target.

    Sample 10 is the best for all targets but the last, whose own is 30; 20 is good for four; the others fall slowly.
    """
    table = np.tile(-np.arange(POOL, dtype=np.float32)[:, None] / 1000, (1, 6))
    table[10], table[20, :4], table[30, 5] = 5, 4, 100
    with mock.patch.object(selector, "table_at", lambda step_id: ArrayTable(table)):
        picks = selector.select(None, STEP, 3)
    selector.forget()
    return [selector.width, picks, *(selector.metric[name] for name in ("score", "serves", "target"))]


def next_number(seed: int, *purpose: object) -> float:
    return float(generator(seed, *purpose).random())


def clustered(selector: Any) -> list[Any]:
    """Pooling, number of clusters, samples whose gradients are taken, and the seed of the clustering."""
    calls: list[int] = []

    def features(_dataset: Any, ids: Any = None, **how: Any) -> Any:
        calls.append(POOL if ids is None else len(ids))
        return np.ones((6 if ids is None else len(ids), how["proj_dim"]), dtype=np.float32)

    with (
        of_class(selector, "k_means") as k_means,
        of_class(selector, "embeddings") as embeddings,
        mock.patch.object(selector.scorer, "gradient_features", features),
    ):
        embeddings.return_value = np.eye(POOL, dtype=np.float32)
        k_means.return_value = _clusters(6)
        selector.each()
    return [embeddings.call_args.kwargs["pooling"], k_means.call_args.args[1], calls[-1], k_means.call_args.args[2]]


def _clusters(count: int) -> Clusters:
    return Clusters(np.arange(POOL) % count, np.zeros(POOL, dtype=np.float32))


def after_learning(mixer: Any) -> list[float]:
    """A `DoremiMixer`'s weights after excess losses of 1, 3 and 0 a token."""
    mixer.learn(np.array([2.0, 6.0, 0.0]), np.array([2.0, 2.0, 5.0]))
    return list(mixer.weights)


def routed(mixer: Any) -> list[float]:
    """A `DynamicMoeMixer`'s weights where the third domain goes to another expert in the last of two layers."""
    loads = np.zeros((3, 2, 2))
    loads[:, 0] = [[1, 0], [0, 1], [1, 0]]
    loads[:, 1] = [[1, 0], [1, 0], [0, 1]]
    with of_class(mixer, "expert_loads") as expert_loads:
        expert_loads.return_value = loads
        return list(mixer.mix(None, STEP))


def some_of_each(seed: int, most: int) -> list[int]:
    draw, ids, start = generator(seed, "dynamic_moe"), [], 0
    for size in SIZES.values():
        ids += draw.permutation(np.arange(start, start + size))[:most].tolist()
        start += size
    return sorted(ids)


def rewarded(mixer: Any) -> list[float]:
    """An `OdmMixer`'s rewards after losses of 1 and 3 a token in two of three domains."""
    mixer.learn(np.array([2.0, 6.0, 0.0]), np.array([2.0, 2.0, 0.0]))
    return list(mixer.rewards)


def weighed(weighter: Any) -> list[float]:
    """A `LossWeighter`'s weights in the middle of a run, of losses 1, 2 and 4."""
    return weighter.sample_weights(
        torch.tensor([1.0, 2.0, 4.0]), ctx=SimpleNamespace(step=10, total_steps=20), model=None, inputs=None
    ).tolist()


def adapted(weighter: Any) -> list[float]:
    """An `AdaptWeighter`'s weights of two samples whose similarities are 0.1 and 0.2."""
    module = type(weighter).__module__
    inputs = {"cu_seqlens": None, "labels": torch.zeros(1, 2, dtype=torch.int64), "lengths": None}
    weighter.anchors = torch.zeros(1, 1)
    with (
        mock.patch(f"{module}.counted_positions"),
        mock.patch(f"{module}.pooled"),
        mock.patch(f"{module}.similarities", return_value=torch.tensor([0.1, 0.2])),
        mock.patch.object(weighter.states, "take", return_value=torch.zeros(1, 1, 1)),
    ):
        return weighter.sample_weights(torch.ones(2), ctx=None, model=None, inputs=inputs).tolist()


def refreshed(weighter: Any) -> list[Any]:
    """How it pools, the anchors' ids, in which of 7 steps they are embedded anew, and the rows that are kept."""
    steps: list[int] = []
    with of_class(weighter, "embeddings") as embeddings:
        embeddings.return_value = np.eye(2, dtype=np.float32)
        for step in range(7):
            weighter.before_step(SimpleNamespace(step=step))
            steps += [step] * (embeddings.call_count - len(steps))
    call = embeddings.call_args
    return [call.kwargs["pooling"], call.args[2].tolist(), steps, len(weighter.anchors)]


def doubted(weighter: Any) -> list[float]:
    """An `EaftWeighter`'s weight of a token where four of eight are equally likely and the others impossible."""
    logits = torch.tensor([[1.0, -50.0, 1.0, -50.0, 1.0, -50.0, 1.0, -50.0]])
    rows = TokenRows(logits, torch.zeros(1, dtype=torch.int64), logits.logsumexp(1))
    return list(weighter.of_logits(rows).tolist())


def kept_tokens(weighter: Any) -> list[float]:
    """A `RhoWeighter`'s weights of tokens whose losses are 0 to 7, and the reference's 0."""
    with mock.patch.object(weighter, "_reference", lambda micro: torch.zeros(8)):
        return list(weighter.among(torch.arange(8.0), SimpleNamespace(labels=torch.ones(8))).tolist())


def anchors(seed: int) -> list[int]:
    return sorted(generator(seed, "adapt anchors").permutation(6)[:2].tolist())


def softmax(*values: float) -> np.ndarray:
    powers = np.exp(np.array(values))
    return powers / powers.sum()


def towards_equal(weights: np.ndarray, share: float) -> list[float]:
    return list((1 - share) * weights + share / len(weights))
