"""`adapt`: weights from how much a sample's representation is like a target's (ADAPT, arXiv 2605.05227, eq. 7-10)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataflex.core.plan import generator
from dataflex.core.registry import register_weighter
from dataflex.ops import shift_labels
from dataflex.scoring.passes.embed_pass import POOLINGS, LastHidden, counted_positions, embeddings, pooled
from dataflex.scoring.scorer import Scorer
from dataflex.train.weighter.base_weighter import SampleWeighter, everywhere
from dataflex.utils.errors import UserError, nearest

SIMILARITIES = ("mean", "max")
# What a form of the weights is used with where nothing else is said.
DEFAULTS: dict[str, dict[str, Any]] = {
    "sigmoid": {"pooling": "weighted", "num_anchors": "all", "refresh_step": 50, "temperature": 1.0},
    "softmax": {"pooling": "trained", "num_anchors": 64, "refresh_step": 100, "temperature": 0.1},
}


def directions(anchors: Tensor, how: str) -> Tensor:
    """What `similarities` needs of the anchors [A, H]: their unit vectors, or for ``mean`` the mean of these [1, H]."""
    units = F.normalize(anchors, dim=1)
    return units.mean(0, keepdim=True) if how == "mean" else units


def similarities(states: Tensor, directions: Tensor) -> Tensor:
    """Cosine of each sample [n, H] to the anchors, their mean or the largest (see `directions`), [n]."""
    return (F.normalize(states, dim=1) @ directions.T).amax(1)


def sigmoid_weights(scores: Tensor, temperature: float) -> Tensor:
    """Weights [n] between 0 and 1, each of its own similarity only: 1 / (1 + exp(-s / temperature))."""
    return torch.sigmoid(scores / temperature)


def softmax_weights(scores: Tensor, temperature: float) -> Tensor:
    """Weights [n] of mean 1 from the similarities [n] of a global micro-batch: n softmax(s / temperature)."""
    return len(scores) * torch.softmax(scores / temperature, dim=0)


@register_weighter("adapt")
class AdaptWeighter(SampleWeighter):
    """Samples like the target count more.

    ::

        phi(x) = sum_i i h_i / sum_j j            h: last hidden states at the positions i = 1, 2, ... of the sample
        s_i    = mean_a cos(phi(x_i), phi(a))     a: the anchors, samples of eval_dataset
        w_i    = sigmoid(s_i / temperature)       in (0, 1): not normalised over the batch
        loss   = sum_i w_i l_i / n

    The hidden states are those of the training forward itself. Since cosines are at most 1, w_i is at most 0.73 at
    temperature 1: the step is smaller as a whole, and the more so the less the batch is like the target.

    weight: ``sigmoid``, or ``softmax``: w_i = n softmax(s / temperature)_i over the global micro-batch, of mean 1.
    pooling: of phi; ``weighted`` as above, or another of `embed_pass.POOLINGS` (``trained``: mean over the positions
    that are trained). num_anchors: drawn once from eval_dataset, or ``all``. refresh_step: weighted steps between
    scoring passes over the anchors. similarity: ``mean`` or ``max`` over the anchors. seed: which samples are the
    anchors. What is None is as `DEFAULTS` says for the form of the weights.
    """

    needs_logits = False

    def __init__(
        self,
        eval_dataset: Any,
        scorer: Scorer,
        weight: str = "sigmoid",
        pooling: str | None = None,
        num_anchors: int | str | None = None,
        refresh_step: int | None = None,
        similarity: str = "mean",
        temperature: float | None = None,
        seed: int = 42,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if eval_dataset is None:
            raise UserError("adapt weighter: needs a target to compare with: set eval_dataset (or val_size)")
        _check_choice("weight", weight, tuple(DEFAULTS))
        default = DEFAULTS[weight]
        pooling = default["pooling"] if pooling is None else pooling
        num_anchors = default["num_anchors"] if num_anchors is None else num_anchors
        refresh_step = default["refresh_step"] if refresh_step is None else refresh_step
        temperature = default["temperature"] if temperature is None else temperature
        _check_choice("pooling", pooling, POOLINGS)
        _check_choice("similarity", similarity, SIMILARITIES)
        for key, value in (("num_anchors", num_anchors), ("refresh_step", refresh_step)):
            if key == "num_anchors" and value == "all":
                continue
            if not isinstance(value, int | float) or value < 1 or int(value) != value:
                more = ", or all" if key == "num_anchors" else ""
                raise UserError(f"adapt weighter: {key}: must be a whole number >= 1{more}, got {value}")
        if not temperature > 0:
            raise UserError(f"adapt weighter: temperature: must be > 0, got {temperature}")
        self.relative = weight == "softmax"
        self.weight, self.pooling, self.similarity = weight, pooling, similarity
        self.target, self.scorer = eval_dataset, scorer
        self.refresh_step, self.temperature = refresh_step, temperature
        self.anchor_ids = np.arange(len(eval_dataset), dtype=np.int64)
        if num_anchors != "all":
            order = generator(seed, "adapt anchors").permutation(len(eval_dataset))
            self.anchor_ids = np.sort(order[: int(num_anchors)]).astype(np.int64)
        self.states = LastHidden(scorer.engine.module)
        self.anchors: Tensor | None = None
        self.refreshed = -1

    def before_step(self, ctx: Any) -> None:
        if self.anchors is not None and ctx.step < self.refreshed + self.refresh_step:
            return
        found = torch.from_numpy(embeddings(self.scorer, self.target, self.anchor_ids, pooling=self.pooling))
        self.anchors, self.refreshed = directions(found.to(self.scorer.device), self.similarity), ctx.step

    def sample_weights(self, losses: Tensor, *, ctx: Any, model: Any, inputs: Any) -> Tensor:
        assert self.anchors is not None, "before_step comes first"
        cu_seqlens = inputs["cu_seqlens"]
        labels = shift_labels(inputs["labels"])
        counted = counted_positions(inputs, labels, cu_seqlens, inputs["lengths"], self.pooling)
        states = pooled(self.states.take().flatten(0, 1), counted, cu_seqlens, self.pooling)
        scores = similarities(states, self.anchors)
        if self.weight == "sigmoid":
            return sigmoid_weights(scores, self.temperature)
        whole, mine = everywhere(scores, ctx)
        return softmax_weights(whole, self.temperature)[mine]

    def state_dict(self) -> dict[str, Any]:
        return {"anchors": None if self.anchors is None else self.anchors.cpu(), "refreshed": self.refreshed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        anchors = state["anchors"]
        self.anchors = None if anchors is None else anchors.to(self.scorer.device)
        self.refreshed = state["refreshed"]


def _check_choice(key: str, value: Any, valid: tuple[str, ...]) -> None:
    if value not in valid:
        hint = nearest(str(value), valid)
        raise UserError(f"adapt weighter: {key}: '{value}'{hint}; valid: {', '.join(valid)}")
