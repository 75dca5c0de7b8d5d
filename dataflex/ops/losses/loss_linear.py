"""Per-sample loss of a linear head without its logits: chunks of tokens, one buffer of logits at a time."""

from __future__ import annotations

from torch import Tensor

from dataflex.ops.losses import loss_reference as reference
from dataflex.ops.losses.linear_products import Products
from dataflex.ops.losses.linear_sweep import Sweep, Weights, sweep_losses
from dataflex.ops.losses.loss_dispatch import SampleLoss
from dataflex.ops.losses.loss_options import LossOptions, check_loss


def linear_per_sample_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_tokens: int = 1024,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    vocab_offset: int | None = None,
    scale: float = 1.0,
    half_logits: bool = False,
) -> SampleLoss:
    """`per_sample_loss` of the logits scale * (hidden @ weight.T + bias), ``chunk_tokens`` rows of them at a time.

    hidden: [N, H]; weight: [V, H] of the same dtype; bias: [V] or None. A chunk's logits are float32 (float64 of
    float64 inputs), or with ``half_logits`` of the inputs' dtype; tokens that do not count are not multiplied at all.
    Peak memory is chunk_tokens * V * 4 bytes, with half as much again for half-precision inputs' gradients (with
    ``half_logits`` half of it, no more); it does not grow with N.
    Where only ``hidden`` needs a gradient it is made in the same sweep as the loss; else the backward makes the
    logits again, and from them the gradients of hidden, weight and bias. The gradients of weight and bias are summed
    in float32. Everything else is as in `per_sample_loss`.
    """
    options = LossOptions(ignore_index, reduction, label_smoothing, z_loss, softcap, vocab_offset)
    check_linear(hidden, weight, bias, labels, cu_seqlens, token_weight, class_weight, chunk_tokens, options)
    how = Sweep(options, chunk_tokens, scale, half_logits)
    products = Products(((hidden, weight),), bias)
    return linear_losses(products, labels, cu_seqlens, Weights(token_weight, class_weight), how)[0]


def linear_losses(
    products: Products, labels: Tensor, cu_seqlens: Tensor, weights: Weights, how: Sweep
) -> tuple[SampleLoss, Tensor | None, Tensor | None]:
    """(losses, total, sketch [N, k1]) of arguments that were checked; total as `sweep_losses` has it."""
    swept = sweep_losses(products, labels, weights, how)
    return sample_loss(swept.token_loss, swept.lse, labels, cu_seqlens, how.options), swept.total, swept.sketch


def sample_loss(
    token_loss: Tensor, lse: Tensor, labels: Tensor, cu_seqlens: Tensor, options: LossOptions
) -> SampleLoss:
    """The samples' losses of those of their tokens."""
    loss, count = reference.sample_losses(token_loss, labels, cu_seqlens, options.ignore_index, options.mean)
    return SampleLoss(loss, count, token_loss, lse)


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    chunk_tokens: int,
    options: LossOptions,
) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"hidden: expected [N, H], got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: expected [V, {hidden.shape[1]}], got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (hidden.dtype, hidden.device):
            got = f"{tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name}: expected {hidden.dtype} on {hidden.device} like hidden, got {got}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: expected at least 1, got {chunk_tokens}")
    check_loss("hidden", hidden, weight.shape[0], labels, cu_seqlens, token_weight, class_weight, options)
