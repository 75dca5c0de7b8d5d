"""Taps: identity functions on layer outputs that see, in the backward, what a weight gradient is made of.

A layer's weight gradient for a sample is a sum over its tokens of products of the layer's input x and the
gradient delta of the layer's output. The tap saves x with save_for_backward (so that both kinds of activation
checkpointing recompute it) and receives delta in its own backward. Tensor hooks and full-backward hooks would
keep x alive and defeat checkpointing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataflex.utils.errors import UserError


class Sink(Protocol):
    """Takes the parts of per-sample gradients, [N, ...] over the flattened tokens of the batch."""

    def outer(self, name: str, row: Tensor, col: Tensor) -> None:
        """Parameter [M, K] has gradient sum of row[t] col[t]^T; row [N, M], col [N, K]."""

    def dense(self, name: str, per_token: Tensor) -> None:
        """Parameter [K] has gradient sum of per_token[t]; per_token [N, K]."""

    def rows(self, name: str, row_ids: Tensor, values: Tensor) -> None:
        """Parameter [M, K] has gradient values[t] in row row_ids[t]; row_ids [N], values [N, K]."""


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, deliver: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.deliver = deliver
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.deliver(x, grads[0])
        return grads[0], None, None


@dataclass(frozen=True)
class Target:
    """A module with the names of those of its parameters that are trained."""

    module: nn.Module
    weight: str | None
    bias: str | None

    @property
    def key(self) -> str:
        return self.weight or self.bias or ""


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """The input of a norm's elementwise scale, float32, of x's shape."""
    x = x if x.dtype is torch.float64 else x.float()
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    assert isinstance(eps, float), f"{type(module).__name__} has no eps"
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Taps:
    """Context manager: inside, a backward through the model delivers every trained parameter to ``sink``.

    targets: from `find_targets`. Enter after `scoring_mode`, whose embedding leaves the taps go on top of. Call
    `start` before each forward and `check_fired` after each backward.
    """

    def __init__(self, targets: list[Target], sink: Sink) -> None:
        self.targets = targets
        self.sink = sink
        self.fired: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Taps:
        for target in self.targets:
            self._handles.append(target.module.register_forward_hook(self._hook(target)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start(self) -> None:
        """Forget what fired; call before each forward."""
        self.fired = {}

    def check_fired(self) -> None:
        """Assert that every target delivered exactly once since `start`."""
        expected = Counter(target.key for target in self.targets)
        wrong = [key for key, times in expected.items() if self.fired.get(key) != times]
        assert not wrong, f"no gradient, or more than one, reached the taps of {', '.join(wrong[:5])}"

    def _hook(self, target: Target) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not output.requires_grad:
                return None
            deliver = self._deliver(target)
            tapped: Tensor = _Tap.apply(output, inputs[0].detach(), deliver)
            return tapped

        return hook

    def _deliver(self, target: Target) -> Callable[[Tensor, Tensor], None]:
        def deliver(x: Tensor, delta: Tensor) -> None:
            self.fired[target.key] = self.fired.get(target.key, 0) + 1
            module, delta = target.module, _flat(delta)
            if target.bias is not None:
                self.sink.dense(target.bias, delta)
            if target.weight is None:
                return
            if isinstance(module, nn.Embedding):
                self.sink.rows(target.weight, x.reshape(-1), delta)
            elif isinstance(module, nn.Linear):
                self.sink.outer(target.weight, delta, _flat(x))
            elif _is_conv1d(module):
                self.sink.outer(target.weight, _flat(x), delta)
            else:
                scaled = _flat(_normalised(module, x))
                self.sink.dense(target.weight, scaled * delta.to(scaled.dtype))

        return deliver


def parameter_names(targets: list[Target]) -> list[str]:
    """Names of the covered parameters, in the order of the modules; a tied one comes once per use."""
    return [name for t in targets for name in (t.weight, t.bias) if name is not None]


def find_targets(module: nn.Module) -> list[Target]:
    """Every module with a trained parameter: nn.Linear, GPT-2's Conv1D, nn.Embedding, nn.LayerNorm, RMSNorm.

    UserError naming the trained parameters that are in no such module.
    """
    name_of = {id(p): n for n, p in module.named_parameters()}
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    covered: set[int] = set()
    targets = []
    for m in module.modules():
        own = [p for p in m.parameters(recurse=False) if id(p) in trained]
        known = isinstance(m, nn.Linear | nn.Embedding) or _is_conv1d(m) or _is_norm(m)
        if not own or not known:
            continue
        weight, bias = getattr(m, "weight", None), getattr(m, "bias", None)
        targets.append(
            Target(
                m,
                name_of[id(weight)] if id(weight) in trained else None,
                name_of[id(bias)] if id(bias) in trained else None,
            )
        )
        covered.update(id(p) for p in (weight, bias) if id(p) in trained)
    missing = sorted(name_of[i] for i in trained - covered)
    if missing:
        raise UserError(
            f"gradient features: no tap covers the trained parameter{'s' if len(missing) > 1 else ''} "
            f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; covered: Linear, Conv1D, "
            "Embedding, LayerNorm and RMSNorm weights and biases"
        )
    if not targets:
        raise UserError("gradient features: the model has no trained parameter")
    return targets
