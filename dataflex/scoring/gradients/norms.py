"""Norms: layers that scale their normalised input, elementwise, by a weight."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_AGREES = 1e-3


def is_layer_norm(module: nn.Module) -> bool:
    """Whether the module normalises by mean and variance of its last dimension; else, being a norm, by the square."""
    return isinstance(module, nn.LayerNorm) or re.fullmatch(r"Cohere\w*LayerNorm", type(module).__name__) is not None


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """The input of a norm's elementwise scale, float32, of x's shape."""
    x = x if x.dtype is torch.float64 else x.float()
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if is_layer_norm(module):
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def is_norm(module: nn.Module) -> bool:
    """Whether the gradients of the module's weight and bias are what `normalised` makes of them.

    True names say too little: some norms work in groups or take a gate. So a copy with random parameters of the same
    sizes, on the CPU, is differentiated once.
    """
    named = isinstance(module, nn.LayerNorm) or is_layer_norm(module) or type(module).__name__.endswith("RMSNorm")
    own = dict(module.named_parameters(recurse=False))
    sizes = {name: getattr(p, "ds_shape", p.shape) for name, p in own.items()}
    if not named or not set(sizes) <= {"weight", "bias"} or any(len(size) != 1 for size in sizes.values()):
        return False
    made = torch.Generator().manual_seed(0)
    probe: Any = copy.copy(module)
    probe.__dict__["_parameters"] = dict.fromkeys(module._parameters)
    drawn = {name: nn.Parameter(torch.randn(size, generator=made)) for name, size in sizes.items()}
    probe._parameters.update(drawn)
    x, delta = torch.randn(2, 3, *next(iter(sizes.values())), generator=made).chunk(2)
    with torch.enable_grad():
        try:
            output = type(module).forward(probe, x)
        except (TypeError, RuntimeError):  # it wants more than one input, or another shape
            return False
        grads = torch.autograd.grad(output, list(drawn.values()), delta, allow_unused=True)
    wanted = {"weight": (normalised(module, x) * delta).sum((0, 1)), "bias": delta.sum((0, 1))}
    return all(
        grad is not None and torch.allclose(grad, wanted[name], _AGREES, _AGREES)
        for name, grad in zip(drawn, grads, strict=True)
    )
