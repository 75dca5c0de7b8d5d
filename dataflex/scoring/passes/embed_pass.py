"""Embeddings of samples: one vector each, from the hidden states of a layer, the last one by default."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dataflex.forward.split import split_batch
from dataflex.ops.known import moved
from dataflex.scoring.batches import Ids, sample_lengths
from dataflex.scoring.context import scoring_mode
from dataflex.scoring.gather import merge
from dataflex.scoring.passes.hidden_states import LAST, hidden_states
from dataflex.scoring.scorer import Scorer
from dataflex.utils.errors import UserError

POOLINGS = ("mean", "last", "trained", "weighted")


def pooled(hidden: Tensor, real: Tensor, cu_seqlens: Tensor, pooling: str) -> Tensor:
    """One vector per sample, float32 [S, H].

    hidden: [N, H], any float dtype; real: bool [N], the positions that count (`counted_positions`); cu_seqlens:
    [S + 1]. pooling: the ``last`` of them; ``weighted``, sum_i i h_i / sum_j j with i from 1 over them; else their
    mean. A sample without any has zeros.
    """
    if pooling == "last":
        place = torch.arange(len(real), device=real.device)
        sample = torch.bucketize(place, cu_seqlens[1:], right=True)
        last = torch.full((len(cu_seqlens) - 1,), -1, device=real.device)
        last.scatter_reduce_(0, sample[real], place[real], "amax")
        return hidden[last.clamp_min(0)].float() * (last >= 0)[:, None]
    lengths = cu_seqlens.diff()
    weights = real.to(torch.float32)
    if pooling == "weighted":
        so_far = torch.cat([weights.new_zeros(1), weights.cumsum(0, dtype=torch.float64)])
        weights *= so_far[1:] - so_far[cu_seqlens[:-1]].repeat_interleave(lengths)
    sums = torch.segment_reduce(hidden.float() * weights[:, None], "sum", lengths=lengths, axis=0, unsafe=True)
    counts = torch.segment_reduce(weights, "sum", lengths=lengths, unsafe=True)
    return sums / counts.clamp_min(1)[:, None]


def embeddings(
    scorer: Scorer,
    dataset: Any,
    ids: Ids | None = None,
    *,
    pooling: str = "mean",
    layer: int = LAST,
    unit: bool = False,
    decoder: nn.Module | None = None,
) -> NDArray[np.float32]:
    """Embeddings of the samples through the current model, float32 [n, hidden size], in the order of ``ids``.

    A forward pass in batches of the scorer's token budget, under any ZeRO stage; call it on every rank. All in
    memory. layer, decoder: as `hidden_states` takes them. unit: scaled to length 1; a vector of zeros stays one.
    UserError for a model that is not one of transformers'.
    """
    ids = np.arange(len(dataset), dtype=np.int64) if ids is None else ids
    module, out = scorer.engine.module, None
    lengths = sample_lengths(dataset, ids)
    with scoring_mode(module, gradients=False), hidden_states(module, layer, decoder) as forward:
        for places, collated in scorer.batches(dataset, ids, "embeddings"):
            batch = split_batch(collated, scorer.device)
            states = forward(batch.inputs).flatten(0, 1)
            if out is None:
                out = np.zeros((len(ids), states.shape[1]), dtype=np.float32)
            if places is None:
                continue
            tokens = moved(torch.from_numpy(lengths[places]), scorer.device)
            real = counted_positions(batch.inputs, batch.labels, batch.cu_seqlens, tokens, pooling)
            vectors = pooled(states, real, batch.cu_seqlens, pooling)
            out[places] = (nn.functional.normalize(vectors) if unit else vectors).cpu().numpy()
    scorer.release()
    assert out is not None
    return merge(out, scorer.device)


def counted_positions(
    inputs: dict[str, Tensor], labels: Tensor, cu_seqlens: Tensor, lengths: Tensor, pooling: str
) -> Tensor:
    """bool [N], what ``pooling`` is over: the positions that are trained (``trained``), else all but the padding.

    labels: [N], shifted. lengths: int64 [S]; where there is no attention mask (packed rows have none) the first
    ``lengths`` tokens of each segment are the sample's.
    """
    if pooling == "trained":
        return labels != -100
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return mask.flatten().bool()
    place = torch.arange(len(labels), device=cu_seqlens.device)
    sample = torch.bucketize(place, cu_seqlens[1:], right=True)
    return place - cu_seqlens[sample] < lengths[sample]


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
