"""A model's output layer: found, and made to give losses of its tokens where it gave logits.

While a forward runs inside `Head.replaced`, the layer's own forward computes losses from the hidden states, so that
ZeRO gathers its weight around them as around logits: DeepSpeed's hooks stand around what the layer returns. A hook
registered after DeepSpeed's then takes the losses out and hands the model a few numbers a token in the logits' place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dataflex.ops.losses.linear_products import Products

# Linear layers with a forward of their own that computes x W^T + b and nothing else.
_PLAIN = ("FalconLinear", "Conv1D")
# What the model gets for the logits of a token. The last is deep in what any softcap cuts off.
PROBE = (-3.0, 0.5, 2.0, 1e4)


@cache
def _probe(device: torch.device) -> Tensor:
    """`PROBE` there, float32: copied once, so that no forward waits for it. To be cloned: models change it in place."""
    return torch.tensor(PROBE, dtype=torch.float32, device=device)


class UnknownHead(Exception):
    """Why no losses can be made inside of a model's output layer."""


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling the module is x W^T + b, or x W + b for a Conv1D."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or type(module).__name__ in _PLAIN


# The products, and the modules that their weights are of, to one tensor with gradient.
MakeLosses = Callable[[Products, tuple[nn.Module, ...]], Tensor]


@dataclass(frozen=True)
class Head:
    """outer: what the model calls; base: the linear layer inside; lora: peft's layer around base, or None."""

    outer: nn.Module
    base: nn.Linear
    lora: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """(vocabulary, hidden size), whole where ZeRO has taken the weight apart."""
        rows, columns = getattr(self.base.weight, "ds_shape", self.base.weight.shape)
        return int(rows), int(columns)

    @property
    def trained(self) -> bool:
        """Whether a parameter as long as the vocabulary is trained."""
        parameters = [*self.base.parameters(), *(() if self.lora is None else self._factor_b().parameters())]
        return any(p.requires_grad for p in parameters)

    def _factor_b(self) -> Any:
        return self.lora.lora_B[_adapter(self.lora)]

    @contextmanager
    def replaced(self, losses: MakeLosses) -> Iterator[list[Tensor]]:
        """Inside, a forward of the model calls ``losses`` in place of the layer; what comes out is in the list.

        The model's logits [B, T, V] are then `PROBE` for every token, [B, T, 4].
        """
        taken: list[Tensor] = []
        forwards: dict[nn.Module, Callable[..., Any]] = {self.base: self._base_forward(losses)}
        if self.lora is not None:
            forwards[self.lora] = self._lora_forward
            forwards[self._factor_b()] = self._factor_forward(losses)

        def take(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            taken.append(output)
            x = args[0] if args else next(iter(kwargs.values()))
            return _probe(x.device).clone().expand(*x.shape[:-1], len(PROBE))

        for module, forward in forwards.items():
            assert "forward" not in vars(module), f"{type(module).__name__} already has a forward of its own"
            module.forward = forward
        handle = self.outer.register_forward_hook(take, with_kwargs=True)
        try:
            yield taken
        finally:
            handle.remove()
            for module in forwards:
                del module.forward

    def _base_forward(self, losses: MakeLosses) -> Callable[..., Any]:
        base = self.base

        def forward(x: Tensor, low: Tensor | None = None) -> Tensor:
            if low is not None:
                return self._factor_b()(low, x)  # type: ignore[no-any-return]
            return losses(Products(((x.flatten(0, -2), base.weight),), base.bias), (base,))

        return forward

    def _lora_forward(self, x: Tensor) -> Tensor:
        """Called inside of each other, so that ZeRO has both matrices gathered at once."""
        lora, name = self.lora, _adapter(self.lora)
        if lora.disable_adapters or lora.merged:
            return self.base(x)  # type: ignore[no-any-return]
        low = lora.lora_A[name](lora.lora_dropout[name](x)) * lora.scaling[name]
        return self.base(x, low)  # type: ignore[no-any-return]

    def _factor_forward(self, losses: MakeLosses) -> Callable[..., Any]:
        base, factor = self.base, self._factor_b()

        def forward(low: Tensor, x: Tensor) -> Tensor:
            pairs = ((x.flatten(0, -2), base.weight), (low.flatten(0, -2), factor.weight))
            return losses(Products(pairs, base.bias), (base, factor))

        return forward


def find_head(module: nn.Module) -> Head:
    """The output layer of a model. UnknownHead, with the reason, for one that is not a linear layer."""
    find: Any = getattr(module, "get_output_embeddings", None)
    outer = find() if find is not None else None
    if not isinstance(outer, nn.Module):
        raise UnknownHead("the model names no output layer (get_output_embeddings)")
    inner: Any = outer
    if type(inner).__name__ == "ModulesToSaveWrapper":
        active = inner.active_adapters
        saved = active and not inner.disable_adapters
        inner = inner.modules_to_save[active[0]] if saved else inner.original_module
    lora = inner if hasattr(inner, "lora_A") and hasattr(inner, "base_layer") else None
    if lora is not None:
        _check_lora(lora)
        inner = lora.base_layer
    if not (isinstance(inner, nn.Linear) and is_plain_linear(inner)):
        raise UnknownHead(f"the output layer is a {type(inner).__name__} with a forward of its own")
    return Head(outer, inner, lora)


def _adapter(lora: Any) -> str:
    return next(name for name in lora.active_adapters if name in lora.lora_A)


def _check_lora(lora: Any) -> None:
    """UnknownHead unless it adds scaling * B A x and nothing else."""
    active = [name for name in lora.active_adapters if name in lora.lora_A]
    if len(active) != 1:
        raise UnknownHead(f"the output layer has {len(active)} active adapters, not one")
    name = active[0]
    if name in lora.lora_variant or lora.lora_B[name].bias is not None:
        raise UnknownHead("the output layer's adapter is more than LoRA's two matrices")
    dtypes = {lora.base_layer.weight.dtype, lora.lora_A[name].weight.dtype, lora.lora_B[name].weight.dtype}
    if len(dtypes) > 1:
        raise UnknownHead("the output layer's adapter is of another dtype than the layer")


def read_probe(output: Tensor) -> tuple[float, float]:
    """(scale, softcap) that a model applies to its logits, from what it made of `PROBE`; (1, 0) for neither.

    UnknownHead where it did something else. output: [..., 4].
    """
    got = output.detach().reshape(-1, output.shape[-1])[0].double().cpu()
    sent = torch.tensor(PROBE, dtype=torch.float64)
    if got.shape != sent.shape:
        raise UnknownHead("the model changes the number of its logits")

    def near(want: Tensor) -> bool:
        return torch.allclose(got, want, rtol=1e-2)

    if torch.equal(got, sent):
        return 1.0, 0.0
    scale, cap = float(got[2] / sent[2]), float(got[3])
    if scale > 0 and near(sent * scale):
        return scale, 0.0
    if cap > 0 and near(cap * torch.tanh(sent / cap)):
        return 1.0, cap
    raise UnknownHead("the model makes something of its logits that is neither a scale nor a softcap")
