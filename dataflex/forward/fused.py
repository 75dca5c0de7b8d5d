"""Losses without logits: made chunk by chunk inside of the model's output layer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dataflex.forward.counted import Counted, Forwarded
from dataflex.forward.head import Head
from dataflex.forward.split import without_logits
from dataflex.ops.losses.linear_products import Products
from dataflex.ops.losses.linear_sweep import Sweep, Swept, Weights, sweep_losses
from dataflex.ops.losses.loss_dispatch import Fold, SampleLoss
from dataflex.ops.losses.loss_linear import linear_losses, sample_loss
from dataflex.ops.losses.loss_options import LossOptions, check_loss
from dataflex.ops.losses.token_rules import TokenRule

# Tokens whose logits exist at once: GPUs need more of them to be busy, and to add up the weight's gradient less often.
CHUNK_TOKENS = {"cpu": 512, "cuda": 2048}
# Logits and their gradient below this are left where they are: without them LESS over a tied layer is slower.
LEAST_BYTES = 192 << 20
# The same where the backward makes logits again: a step is up to 1.4 times as long, so memory has to be short.
LEAST_BYTES_TWICE = 1 << 30


@dataclass(frozen=True)
class HeadCall:
    """A forward's call of the output layer: what its losses are of, and the modules that the weights belong to."""

    products: Products
    modules: tuple[nn.Module, ...]
    labels: Tensor
    token_loss: Tensor
    lse: Tensor
    scale: float
    softcap: float


# May put a tap on the token losses: returns them.
Watch = Callable[[HeadCall], Tensor]


@dataclass(frozen=True)
class FusedHead:
    """The output layer of one model, and what the model makes of its logits.

    always: where it is possible, not only where it pays. twice: a backward makes the logits again, since the weights of
    a trained layer come after the losses.
    """

    head: Head
    scale: float = 1.0
    softcap: float = 0.0
    always: bool = False
    twice: bool = False

    def pays(self, tokens: int, *, backward: bool) -> bool:
        """Whether a forward of so many tokens shall do without logits.

        It shall where their memory is at least `LEAST_BYTES`, or `LEAST_BYTES_TWICE`, and what stands in their place at
        most half of it. The logits are there twice where there is a backward, as themselves and as their gradient. In
        their place are those of a chunk; with a backward the hidden states' gradient too, and, for a trained layer in
        half precision, the weight's gradient in float32.
        """
        if self.always:
            return True
        vocabulary, hidden = self.head.shape
        weight = self.head.base.weight
        size = weight.element_size()
        plain = tokens * vocabulary * size * (2 if backward else 1)
        chunk = min(tokens, _chunk(weight)) * vocabulary
        instead = chunk * (size if _half_logits(weight) else max(4, size))
        if backward:
            instead += tokens * hidden * size
            instead += chunk * size if weight.is_cuda and size < 4 else 0
            instead += 4 * vocabulary * hidden if self.head.trained and size < 4 else 0
        least = LEAST_BYTES_TWICE if self.twice and backward else LEAST_BYTES
        return plain >= least and 2 * instead <= plain

    def least_tokens(self, most: int) -> int:
        """The fewest tokens, up to ``most``, of which a forward with a backward pays."""
        return bisect_left(range(most), True, key=lambda tokens: self.pays(tokens, backward=True))

    def losses(
        self,
        run: Callable[..., Any],
        inputs: Mapping[str, Tensor],
        counted: Counted,
        factors: Tensor | None = None,
        watch: Watch | None = None,
        rule: TokenRule | None = None,
    ) -> Forwarded:
        """What `Forward.__call__` returns, without logits; reading those of the outputs is a UserError."""
        options = LossOptions(reduction=counted.reduction, softcap=self.softcap)
        found: list[Swept] = []

        def make(products: Products, modules: tuple[nn.Module, ...]) -> Tensor:
            x, weight = products.pairs[0]
            weights = counted.token_weight, counted.class_weight
            check_loss("hidden states", x, len(weight), counted.labels, counted.cu_seqlens, *weights, options)
            how = Sweep(options, _chunk(x), self.scale, _half_logits(x), rule=rule)
            trained = torch.is_grad_enabled() and any(w.requires_grad for _, w in products.pairs)
            known = factors if trained else None
            swept = sweep_losses(products, counted.labels, Weights(*weights, known), how)
            found.append(swept)
            if swept.total is not None:
                return swept.total
            lse = swept.lse.detach()
            call = HeadCall(products, modules, counted.labels, swept.token_loss, lse, self.scale, self.softcap)
            return swept.token_loss if watch is None else watch(call)

        with self.head.replaced(make) as taken:
            outputs = run(**inputs)
        assert len(taken) == 1, f"the output layer was called {len(taken)} times in a forward"
        (swept,) = found
        summed = swept.total is not None
        token_loss = swept.token_loss if summed else taken[0]
        losses = sample_loss(token_loss, swept.lse.detach(), counted.labels, counted.cu_seqlens, options)
        return Forwarded(losses, without_logits(outputs), taken[0] if summed else None, swept.numbers)

    def sketched(
        self,
        run: Callable[..., Any],
        inputs: Mapping[str, Tensor],
        counted: Counted,
        *,
        k1: int,
        seed: int,
        tensor: int,
    ) -> tuple[SampleLoss, Tensor, Tensor]:
        """(losses, sketch [N, k1], what the layer was given [N, H]) of a forward without gradient.

        sketch: of each token's gradient by the layer's own outputs, before the model scales or caps them. k1, seed,
        tensor: the fold's; see `dataflex.ops.loss_and_head_sketch`.
        """
        options = LossOptions(reduction=counted.reduction, softcap=self.softcap)
        found: list[tuple[SampleLoss, Tensor, Tensor]] = []

        def make(products: Products, modules: tuple[nn.Module, ...]) -> Tensor:
            x, _ = products.pairs[0]
            how = Sweep(options, _chunk(x), self.scale, _half_logits(x), fold=Fold(k1, seed, tensor))
            losses, _, sketch = linear_losses(products, counted.labels, counted.cu_seqlens, Weights(), how)
            assert sketch is not None
            found.append((losses, sketch.mul_(self.scale), x))
            return losses.token_loss

        with torch.no_grad(), self.head.replaced(make):
            run(**inputs)
        (made,) = found
        return made


def _chunk(like: Tensor) -> int:
    return CHUNK_TOKENS.get(like.device.type, CHUNK_TOKENS["cuda"])


def _half_logits(like: Tensor) -> bool:
    """CPUs multiply matrices of half precision several times as fast as their float32 copies."""
    return like.device.type == "cpu" and like.element_size() < 4
