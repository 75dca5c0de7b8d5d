"""`rho`: only the tokens count that the model is worst at compared with a reference (Rho-1, arXiv 2404.07965)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dataflex.core.registry import register_weighter
from dataflex.ops.losses.token_rules import TokenRows
from dataflex.train.weighter.token_weighter import TokenWeighter
from dataflex.utils import dist
from dataflex.utils.errors import UserError

# The bits of a float32 that each pass over the ranks' values settles, from the highest.
_PASSES = (12, 12, 8)


def at_least_kth(values: Tensor, k: Tensor) -> Tensor:
    """bool [n]: which of this rank's values are among the ``k`` largest of all ranks', ties of the k-th included.

    values: float32 [n], n may be 0 here; k: int64 scalar, from 1 to their number on all ranks. Exact: the k-th largest
    is found digit by digit, from a histogram of all ranks' values for each. A collective.
    """
    bits = (values + 0.0).view(torch.int32).to(torch.int64)  # -0.0 is 0.0
    keys = torch.where(bits >= 0, bits + (1 << 31), -1 - bits)
    found, left, shift = torch.zeros_like(k), k.clone(), 32
    for width in _PASSES:
        here = (keys >> shift) == found
        shift -= width
        digits = (keys[here] >> shift) & ((1 << width) - 1)
        counts = dist.all_reduce(torch.bincount(digits, minlength=1 << width))
        from_top = counts.flip(0).cumsum(0)
        above = (from_top < left).sum()
        left = left - torch.where(above > 0, from_top[(above - 1).clamp(min=0)], 0)
        found = (found << width) + (counts.numel() - 1 - above)
    return keys >= found


@register_weighter("rho")
class RhoWeighter(TokenWeighter):
    """The ``share`` of the tokens of the global micro-batch with the largest excess losses l_t - l_ref_t.

    They weigh 1 / (their actual share), so that the mean weight is 1, and the loss per token is the mean over them
    (equation 4 of the paper); the others weigh 0. Ties at the threshold are in. The losses compared are those of the
    labels, without any weight.

    reference_model_path: folder of the reference model, or of its stored token losses (`dataflex-cli score`).
    """

    relative = True

    def __init__(
        self,
        open_reference: Callable[[str], Callable[[Any], Tensor]],
        reference_model_path: str | None = None,
        share: float = 0.6,
    ) -> None:
        if not reference_model_path:
            raise UserError(
                "rho weighter: reference_model_path: missing, the folder of the reference model or of its token losses"
            )
        if not 0 < share <= 1:
            raise UserError(f"rho weighter: share: expected a number above 0, up to 1, got {share}")
        self.share = float(share)
        self._reference = open_reference(reference_model_path)

    def of_logits(self, rows: TokenRows) -> Tensor:
        return rows.losses()

    def among(self, numbers: Tensor, micro: Any) -> Tensor:
        counted = micro.labels != -100
        excess = (numbers - self._reference(micro))[counted].float()
        tokens = dist.all_reduce(counted.sum())
        wanted = (self.share * tokens.double()).round(decimals=6).ceil().to(torch.int64)
        kept = at_least_kth(excess, wanted.clamp(min=1))
        share = dist.all_reduce(kept.sum()).double() / tokens.clamp(min=1)
        weights = torch.zeros_like(numbers)
        weights[counted] = (kept / share.clamp(min=torch.finfo(torch.float32).tiny)).to(weights.dtype)
        return weights
