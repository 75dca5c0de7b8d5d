"""The fused experts of transformers' mixture models, run so that each product can be tapped.

Their usual implementations hide what is needed (grouped products) or copy the weights of every token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Rows sorted by expert, in the order of tokens within each: tokens [P] int64; counts: rows of each expert."""

    tokens: Tensor
    counts: list[int]


TapExperts = Callable[[str, Tensor, Tensor, Routing], Tensor]


def run_experts(
    module: Any, tap: TapExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What ``module`` computes from [N, H], chosen experts [N, k] and their weights [N, k].

    tap: called as ``tap(attribute, output, input, routing)`` on the output of each product; its result goes on.
    """
    chosen = top_k_index.shape[-1]
    expert_of = top_k_index.reshape(-1)
    order = torch.argsort(expert_of, stable=True)
    counts = torch.bincount(expert_of, minlength=module.num_experts).tolist()
    at = Routing(order // chosen, counts)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    x = hidden_states[at.tokens]
    middle = tap(up, _products(module, up, x, counts), x, at)
    middle = module._apply_gate(middle) if module.has_gate else module.act_fn(middle)
    out = tap("down_proj", _products(module, "down_proj", middle, counts), middle, at)
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    out = out * top_k_weights.reshape(-1)[order, None]
    by_token = torch.empty_like(order)
    by_token[order] = torch.arange(len(order), device=order.device)
    return out[by_token].view(len(hidden_states), chosen, -1).sum(1).to(hidden_states.dtype)


def _products(module: Any, attribute: str, x: Tensor, counts: list[int]) -> Tensor:
    """[P, M]: each row of x [P, K] times its expert's matrix, plus its bias."""
    weight = getattr(module, attribute)
    bias = getattr(module, f"{attribute}_bias") if module.has_bias else None
    parts = []
    for e, rows in enumerate(torch.split(x, counts)):
        out = rows @ (weight[e] if module.is_transposed else weight[e].T)
        parts.append(out if bias is None else out + bias[e])
    return torch.cat(parts)
