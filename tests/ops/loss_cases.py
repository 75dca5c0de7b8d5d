"""What the tests of the losses share: cases drawn by hypothesis, and the loss in float64 by another road."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    logits: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    options: dict[str, Any]


@st.composite
def cases(draw: st.DrawFn, largest: int = 700, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    """Odd sizes, strided rows, empty and all-masked samples, large, tiny and infinite logits, every option."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    vocabulary = draw(st.integers(2, 40) | st.integers(2, largest))
    tokens, gap = sum(lengths), draw(st.sampled_from([0, 0, 1, 5]))
    logits = draw(st.sampled_from([1e-3, 1.0, 8.0])) * torch.randn(tokens, vocabulary + gap, generator=generator)
    logits = logits + draw(st.sampled_from([0.0, 0.0, 400.0, -700.0]))
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    smoothing = draw(st.sampled_from([0.0, 0.0, 0.1]))
    if draw(st.booleans()) and smoothing == 0.0:
        away = torch.rand(logits.shape, generator=generator) < 0.3
        away[torch.arange(tokens), labels] = False
        logits = logits.masked_fill(away, -torch.inf)
    labels[torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -100
    weight = torch.rand(max(tokens, vocabulary), generator=generator)
    options = {
        "reduction": draw(st.sampled_from(["mean", "sum"])),
        "label_smoothing": smoothing,
        "z_loss": draw(st.sampled_from([0.0, 1e-3])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 30.0])) if smoothing == 0.0 or vocabulary % 2 else 0.0,
        "token_weight": weight[:tokens] if draw(st.booleans()) else None,
        "class_weight": weight[:vocabulary] if draw(st.booleans()) else None,
    }
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return Case(logits.to(draw(st.sampled_from(dtypes)))[:, :vocabulary], labels, cu_seqlens, options)


def plain_token_losses(logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
    """Token losses [N] of logits in their own dtype, by PyTorch's cross_entropy."""
    cap = options.get("softcap", 0.0)
    x = cap * torch.tanh(logits / cap) if cap else logits
    class_weight, token_weight = options.get("class_weight"), options.get("token_weight")
    class_weight = None if class_weight is None else class_weight.to(x.dtype)
    loss = F.cross_entropy(
        x, labels, weight=class_weight, reduction="none", label_smoothing=options.get("label_smoothing", 0.0)
    )
    if options.get("z_loss"):
        loss = loss + options["z_loss"] * x.logsumexp(1).square()
    return loss if token_weight is None else loss * token_weight.to(x.dtype)


def by_hand(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Losses [S] and their sum's gradient [N, V], both float64, computed in ``dtype`` sample by sample."""
    x = case.logits.detach().to(dtype).clone().requires_grad_()
    losses = []
    bounds = case.cu_seqlens.tolist()
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        kept = (case.labels[a:b] != -100).nonzero()[:, 0] + a
        options = dict(case.options)
        if options.get("token_weight") is not None:
            options["token_weight"] = options["token_weight"][kept]
        total = plain_token_losses(x[kept], case.labels[kept], options).sum()
        losses.append(total / max(1, len(kept)) if options.get("reduction", "mean") == "mean" else total)
    loss = torch.stack(losses)
    loss.sum().backward()
    assert x.grad is not None
    return loss.detach().double(), x.grad.double()


def luck(case: Case) -> float:
    """What smoothed labels add to the error of a loss: they take the mean of the logits, which may be hundreds."""
    finite = case.logits[case.logits.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return 1.2e-7 * float(case.options.get("label_smoothing", 0.0)) * largest


def within_budget(got: Tensor, exact: Tensor, plain: Tensor, more: float = 0.0) -> None:
    """Largest error at most twice plain PyTorch's, and a little for its luck; finite where plain PyTorch overflows.

    A sum of exponentials is at least 1 and rounded to 1.2e-7, so a small loss is off by a few times that. more: `luck`.
    """
    if not exact.numel():
        return
    scale = float(exact.abs().max())
    allowed = 2 * float((plain - exact).abs().max().nan_to_num(nan=torch.inf)) + 4e-7 * scale + 3e-7 + more
    budget = min(allowed, 0.1 * scale + 1e-7)
    error = float((got.detach().double() - exact).abs().max())
    assert error <= budget, (error, budget)
