"""Embeddings of samples: one vector each, from the hidden states of the last layer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dataflex.forward.split import few_logits, split_batch
from dataflex.ops.known import moved
from dataflex.scoring.batches import Ids, bucket, deal
from dataflex.scoring.context import scoring_mode
from dataflex.scoring.gather import merge
from dataflex.scoring.scorer import Scorer, sample_lengths
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

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


def embeddings(scorer: Scorer, dataset: Any, ids: Ids | None = None, *, pooling: str = "mean") -> NDArray[np.float32]:
    """Embeddings of the samples through the current model, float32 [n, hidden size], in the order of ``ids``.

    A forward pass in batches of the scorer's token budget, under any ZeRO stage; call it on every rank. All in
    memory. UserError for a model that is not one of transformers'.
    """
    ids = np.arange(len(dataset), dtype=np.int64) if ids is None else ids
    lengths = sample_lengths(dataset, ids)
    batches = bucket(np.arange(len(ids), dtype=np.int64), lengths, scorer.token_budget)
    out: NDArray[np.float32] | None = None
    started = time.monotonic()
    with scoring_mode(scorer.engine.module, gradients=False), _last_hidden_states(scorer.engine.module) as forward:
        for places, counts in deal(batches, dist.rank(), dist.world_size()):
            batch = split_batch(scorer.collator([dataset[int(i)] for i in ids[places]]), scorer.device)
            tokens = moved(torch.from_numpy(lengths[places]), scorer.device)
            real = counted_positions(batch.inputs, batch.labels, batch.cu_seqlens, tokens, pooling)
            vectors = pooled(forward(batch.inputs).flatten(0, 1), real, batch.cu_seqlens, pooling)
            if out is None:
                out = np.zeros((len(ids), vectors.shape[1]), dtype=np.float32)
            if counts:
                out[places] = vectors.cpu().numpy()
    scorer.release()
    scorer.tally(len(ids))
    assert out is not None
    seconds = time.monotonic() - started
    logger.info(f"embeddings: {len(ids):,} samples, {int(lengths.sum()):,} tokens in {seconds:.1f} s")
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


@contextmanager
def _last_hidden_states(module: nn.Module) -> Iterator[Any]:
    """Inside, a function from model inputs to the last layer's hidden states [B, T, H].

    The whole model runs, as ZeRO-3 wants it, with logits of one token only where it can do that.
    """
    unwrap: Any = getattr(module, "get_base_model", None)
    whole: nn.Module = module if unwrap is None else unwrap()
    decoder = getattr(whole, "base_model", None)
    if not isinstance(decoder, nn.Module) or decoder is whole:
        raise UserError(f"embeddings: need a causal language model of transformers, got {type(whole).__name__}")
    seen: list[Tensor] = []
    handle = decoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
    few = few_logits(module)

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        module(**inputs, **few)
        return seen.pop()

    try:
        yield forward
    finally:
        handle.remove()


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
