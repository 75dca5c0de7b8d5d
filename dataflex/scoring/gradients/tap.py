"""Taps: identity functions on layer outputs that see, in the backward, what a weight gradient is made of.

A layer's weight gradient for a sample is a sum over its tokens of products of the layer's input x and the
gradient delta of the layer's output. The tap saves x with save_for_backward (so that both kinds of activation
checkpointing recompute it) and receives delta in its own backward. Tensor hooks and full-backward hooks would
keep x alive and defeat checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, deliver: Callable[..., None], *saved: Tensor) -> Tensor:
        ctx.save_for_backward(*saved)
        ctx.deliver = deliver
        # Not a view: some models add to a layer's output in place, which autograd forbids for views of this kind.
        return output.data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with torch.no_grad():
            ctx.deliver(grads[0], *saved)
        return (grads[0], None, *(None for _ in saved))


def tap(output: Tensor, deliver: Callable[..., None], *saved: Tensor) -> Tensor:
    """``output``, whose gradient delta goes to ``deliver(delta, *saved)`` in the backward."""
    if not output.requires_grad:
        return output
    tapped: Tensor = _Tap.apply(output, deliver, *(s.detach() for s in saved))
    return tapped


@contextmanager
def calls_to(function: str, shape: tuple[int, ...], seen: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Pass the output of every F.linear or F.embedding with a weight of ``shape`` through ``seen(output, input)``.

    ZeRO-3 replaces F.linear itself, by one that no torch function mode sees.
    """
    original = getattr(F, function)

    def tapped(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = original(input, weight, *args, **kwargs)
        return seen(output, input) if tuple(weight.shape) == shape else output

    setattr(F, function, tapped)
    try:
        yield
    finally:
        setattr(F, function, original)
