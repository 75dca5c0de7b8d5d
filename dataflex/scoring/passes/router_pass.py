"""Which experts of a mixture-of-experts model the tokens of groups of samples are routed to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex.forward.split import few_logits, split_batch
from dataflex.scoring.batches import Ids, bucket, deal
from dataflex.scoring.context import scoring_mode
from dataflex.scoring.scorer import Scorer, sample_lengths
from dataflex.utils import dist


def has_routers(config: Any) -> bool:
    """Whether a model of this transformers config can return router logits."""
    return hasattr(config, "output_router_logits")


def chosen_experts(logits: Tensor, experts: int) -> Tensor:
    """How often each of E experts is among a token's ``experts`` highest logits: [N, E] to 0 and 1, float64 [N, E]."""
    top = logits.float().topk(experts, dim=-1).indices
    return torch.zeros_like(logits, dtype=torch.float64).scatter_(-1, top, 1.0)


def expert_loads(scorer: Scorer, dataset: Any, ids: Ids, groups: Ids, count: int) -> NDArray[np.float64]:
    """Share of each expert in the routing of each group's tokens: [count, MoE layers, E], sums to 1 over E.

    ids: int64 [n], samples of ``dataset``. groups: int64 [n], < count; a group without samples has only zeros.
    A collective: every rank takes part of the batches, and gets the same result. The training state stays as it was.
    """
    module, lengths = scorer.engine.module, sample_lengths(dataset, ids)
    batches = bucket(np.arange(len(ids), dtype=np.int64), lengths, scorer.token_budget)
    loads: Tensor | None = None
    few = few_logits(module)
    with scoring_mode(module, gradients=False):
        for places, counts in deal(batches, dist.rank(), dist.world_size()):
            inputs, _, _, cu_seqlens = split_batch(
                scorer.collator([dataset[int(i)] for i in ids[places]]), scorer.device
            )
            routed = module(**inputs, **few, output_router_logits=True).router_logits
            chosen = torch.stack(
                [chosen_experts(r, module.config.num_experts_per_tok) for r in routed if r is not None], dim=1
            )
            if loads is None:
                loads = chosen.new_zeros(count, *chosen.shape[1:])
            if counts:
                real = torch.from_numpy(lengths[places]).to(scorer.device)
                group = torch.from_numpy(groups[places]).to(scorer.device)
                loads.index_add_(0, *_real_tokens(chosen, cu_seqlens, real, group))
    assert loads is not None
    scorer.release()
    scorer.tally(len(ids), int(lengths.sum()))
    total = dist.all_reduce(loads)
    return (total / total.sum(-1, keepdim=True).clamp(min=1)).cpu().numpy()


def _real_tokens(chosen: Tensor, cu_seqlens: Tensor, lengths: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Groups of the tokens that are not padding, which comes last in a sample, and their rows of ``chosen``."""
    spans = cu_seqlens.diff()
    within = torch.arange(len(chosen), device=chosen.device) - cu_seqlens[:-1].repeat_interleave(spans)
    real = within < lengths.repeat_interleave(spans)
    return groups.repeat_interleave(spans)[real], chosen[real]
