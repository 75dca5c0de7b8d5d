"""Representations of samples: the mean of the model's last hidden states over the positions that are trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataflex.ops import shift_labels
from dataflex.scoring.batches import Ids
from dataflex.scoring.context import scoring_mode
from dataflex.scoring.gather import merge
from dataflex.scoring.scorer import Floats, Scorer
from dataflex.scoring.split import split_batch
from dataflex.utils.errors import UserError


class LastHidden:
    """Keeps what the output layer of ``module`` was last given, [B, T, H] without gradient: no second forward.

    Holds the tensor only, without a copy. UserError for a model without an output layer.
    """

    def __init__(self, module: nn.Module) -> None:
        find = getattr(module, "get_output_embeddings", None)
        head = find() if find is not None else None
        if not isinstance(head, nn.Module):
            raise UserError(f"{type(module).__name__}: has no output layer (get_output_embeddings) to read states from")
        self._value: Tensor | None = None
        head.register_forward_pre_hook(self._keep)

    def _keep(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._value = inputs[0].detach()

    def take(self) -> Tensor:
        """The states of the last forward, once."""
        value, self._value = self._value, None
        assert value is not None, "no forward has passed the output layer"
        return value


def mean_states(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean over each sample's counted positions, float32 [S, H]; 0 for a sample without any.

    hidden: [B, T, H]. labels: [B * T] int64, shifted. cu_seqlens: [S + 1] int64.
    """
    samples = len(cu_seqlens) - 1
    segment = torch.repeat_interleave(torch.arange(samples, device=labels.device), cu_seqlens.diff())
    counted = labels != -100
    total = torch.zeros(samples, hidden.shape[-1], device=hidden.device)
    total.index_add_(0, segment[counted], hidden.flatten(0, 1)[counted].float())
    count = torch.bincount(segment[counted], minlength=samples)
    return total / count.clamp(min=1)[:, None]


def representations(scorer: Scorer, states: LastHidden, dataset: Any, ids: Ids) -> Floats:
    """`mean_states` of each sample, float32 [n, H], the same on every rank; a collective.

    Leaves the training state bit-identical.
    """
    found: list[tuple[Ids, np.ndarray]] = []
    width = 0
    with scoring_mode(scorer.engine.module, gradients=False):
        for places, batch in scorer._batches(dataset, ids, "scoring representations"):
            inputs, labels, _, cu_seqlens = split_batch(batch, scorer.device)
            scorer.engine.module(**inputs)
            means = mean_states(states.take(), labels, cu_seqlens).cpu().numpy()
            width = means.shape[1]
            if places is not None:
                found.append((places, means))
    scorer._release()
    out = np.zeros((len(ids), width), dtype=np.float32)
    for places, means in found:
        out[places] = means
    return merge(out, scorer.device)


def raw_mean_states(hidden: Tensor, raw_labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`mean_states` from labels as collated, [B, T]."""
    return mean_states(hidden, shift_labels(raw_labels), cu_seqlens)
