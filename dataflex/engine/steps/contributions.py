"""What samples and tokens contribute to the loss of a step (design section 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from dataflex.engine.steps.batches import MicroBatch, StepBatch
from dataflex.ops import SampleLoss
from dataflex.utils import dist


def micro_loss(losses: SampleLoss, weights: Tensor | None, normalization: str) -> Tensor:
    """The numerator of a micro-batch: sum of w_i l_i over samples, or over tokens. Scalar with gradient.

    losses: mean-reduced. normalization: ``tokens``, ``mean`` or ``sum_weights``.
    """
    per_sample = losses.loss * losses.count if normalization == "tokens" else losses.loss
    return (per_sample if weights is None else weights * per_sample).sum()


def token_factors(micro: MicroBatch, weights: Tensor | None, normalization: str) -> Tensor:
    """What each token's loss is multiplied with in `micro_loss`, float32 [N]."""
    by_sample = torch.ones_like(micro.counts, dtype=torch.float32) if weights is None else weights.float()
    if normalization != "tokens":
        by_sample = by_sample / micro.counts.clamp(min=1)
    return by_sample.repeat_interleave(micro.cu_seqlens.diff(), output_size=len(micro.labels))


def weighted_tokens(
    micro: MicroBatch, losses: SampleLoss, weights: Tensor | None, normalization: str, by_token: Tensor
) -> Tensor:
    """`micro_loss` of token losses that are multiplied by ``by_token`` [N] first."""
    return (token_factors(micro, weights, normalization) * by_token * losses.token_loss).sum()


def step_denominator(batch: StepBatch, normalization: str) -> Tensor:
    """What the step's loss is divided by, float64 scalar on the device: tokens, samples or sum of weights of all ranks.

    A collective, but for ``mean``: how many samples a global batch has is known from the plan.
    """
    micro = batch.micro_batches
    if normalization == "mean":
        return torch.full((), float(len(batch.sample_ids)), dtype=torch.float64, device=micro[0].labels.device)
    if normalization == "tokens":
        mine = torch.stack([m.counts.sum() for m in micro]).sum()
    elif micro[0].weights is None:
        samples = sum(len(m.sample_ids) for m in micro)
        mine = torch.full((), float(samples), dtype=torch.float64, device=micro[0].labels.device)
    else:
        mine = torch.stack([m.weights.sum() for m in micro if m.weights is not None]).sum()
    return dist.all_reduce(mine.to(torch.float64))
