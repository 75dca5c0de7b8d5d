"""`adapt`: weights from how much a sample's representation is like a target's (ADAPT, arXiv 2605.05227)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataflex.core.plan import generator
from dataflex.core.registry import register_weighter
from dataflex.ops import shift_labels
from dataflex.scoring.embed_pass import LastHidden, embeddings, pooled
from dataflex.scoring.scorer import Scorer
from dataflex.train.weighter.base_weighter import SampleWeighter
from dataflex.utils import dist
from dataflex.utils.errors import UserError, nearest

SIMILARITIES = ("mean", "max")


def similarities(states: Tensor, anchors: Tensor, how: str) -> Tensor:
    """Cosine of each sample to the anchors, their mean or the largest, [n]. states: [n, H]; anchors: [A, H]."""
    cosines = F.normalize(states, dim=1) @ F.normalize(anchors, dim=1).T
    return cosines.mean(1) if how == "mean" else cosines.amax(1)


def similarity_weights(scores: Tensor, temperature: float) -> Tensor:
    """Weights [n] of mean 1 from the similarities [n] of a global micro-batch: n softmax(s / temperature)."""
    return len(scores) * torch.softmax(scores / temperature, dim=0)


@register_weighter("adapt")
class AdaptWeighter(SampleWeighter):
    """Samples like the target count more: w = n softmax(s / temperature) over the global micro-batch.

    s: cosine of the sample's representation (mean of the last hidden states over its trained positions, from the
    training forward itself) to those of ``num_anchors`` samples of eval_dataset: their ``mean`` or the ``max``.
    refresh_step: weighted steps between scoring passes over the anchors. seed: which samples are the anchors.
    """

    relative = True

    def __init__(
        self,
        eval_dataset: Any,
        scorer: Scorer,
        num_anchors: int = 64,
        refresh_step: int = 100,
        similarity: str = "mean",
        temperature: float = 0.1,
        seed: int = 42,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if eval_dataset is None:
            raise UserError("adapt weighter: needs a target to compare with: set eval_dataset (or val_size)")
        if similarity not in SIMILARITIES:
            hint, valid = nearest(similarity, SIMILARITIES), ", ".join(SIMILARITIES)
            raise UserError(f"adapt weighter: similarity: '{similarity}'{hint}; valid: {valid}")
        for key, value in (("num_anchors", num_anchors), ("refresh_step", refresh_step)):
            if value < 1 or int(value) != value:
                raise UserError(f"adapt weighter: {key}: must be a whole number >= 1, got {value}")
        if not temperature > 0:
            raise UserError(f"adapt weighter: temperature: must be > 0, got {temperature}")
        self.target, self.scorer = eval_dataset, scorer
        self.refresh_step, self.similarity, self.temperature = refresh_step, similarity, temperature
        order = generator(seed, "adapt anchors").permutation(len(eval_dataset))
        self.anchor_ids = np.sort(order[:num_anchors]).astype(np.int64)
        self.states = LastHidden(scorer.engine.module)
        self.anchors: Tensor | None = None
        self.refreshed = -1

    def before_step(self, ctx: Any) -> None:
        if self.anchors is not None and ctx.step < self.refreshed + self.refresh_step:
            return
        found = embeddings(self.scorer, self.target, self.anchor_ids, pooling="trained")
        self.anchors, self.refreshed = torch.from_numpy(found).to(self.scorer.device), ctx.step

    def sample_weights(self, losses: Tensor, *, ctx: Any, model: Any, inputs: Any) -> Tensor:
        assert self.anchors is not None, "before_step comes first"
        trained = shift_labels(inputs["labels"]) != -100
        states = pooled(self.states.take().flatten(0, 1), trained, inputs["cu_seqlens"], "mean")
        scores = similarities(states, self.anchors, self.similarity)
        weights = similarity_weights(dist.all_gather(scores), self.temperature)
        mine = len(losses) * dist.rank()
        return weights[mine : mine + len(losses)]

    def state_dict(self) -> dict[str, Any]:
        return {"anchors": None if self.anchors is None else self.anchors.cpu(), "refreshed": self.refreshed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        anchors = state["anchors"]
        self.anchors = None if anchors is None else anchors.to(self.scorer.device)
        self.refreshed = state["refreshed"]
