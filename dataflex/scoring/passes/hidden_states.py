"""Hidden states of a model's layer: a forward ends there, without the output layer and the layers behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from dataflex.forward.split import few_logits
from dataflex.utils.errors import UserError, shown

LAST = -1


class _Reached(Exception):
    """Ends a forward whose states are known."""


def decoder_of(module: nn.Module) -> nn.Module:
    """The part of a causal language model of transformers below the output layer. UserError for other models."""
    unwrap: Any = getattr(module, "get_base_model", None)
    whole: nn.Module = module if unwrap is None else unwrap()
    decoder = getattr(whole, "base_model", None)
    if not isinstance(decoder, nn.Module) or decoder is whole:
        raise UserError(f"embeddings: need a causal language model of transformers, got {type(whole).__name__}")
    return decoder


def check_layer(decoder: nn.Module, layer: Any, source: str = "embeddings") -> None:
    """UserError, in the name of ``source``, unless ``layer`` is one of the decoder's: see `hidden_states`."""
    if layer == LAST and not isinstance(layer, bool):
        return
    count = len(_layers(decoder))
    if not count:
        raise UserError(f"{source}: layer: {type(decoder).__name__} does not say which its layers are; leave it at -1")
    if isinstance(layer, bool) or not isinstance(layer, int) or layer == 0 or abs(layer) > count:
        raise UserError(
            f"{source}: layer: {shown(layer)}; valid: a layer's number from 1 to {count}, or from the end: -1 (the "
            f"last) to -{count}"
        )


def _layers(decoder: nn.Module) -> list[nn.Module]:
    """The layers in their order; none where the model does not say."""
    config: Any = getattr(decoder, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(config, "num_hidden_layers", 0)
    lists = (m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return list(next(lists, ()))


@contextmanager
def hidden_states(
    module: nn.Module, layer: int = LAST, decoder: nn.Module | None = None
) -> Iterator[Callable[[dict[str, Tensor]], Tensor]]:
    """Inside, a function from the inputs of ``module`` to hidden states [B, T, H].

    layer: of what a layer returns, counted from 1, or from the end: -1 is the last, with the norm behind it, as
    transformers' ``hidden_states[layer]`` is. decoder: the part that returns the last layer's, by default that below
    the output layer. The forward ends where the states are known. Under ZeRO-3, which must see every layer come and go,
    it runs to its end, with logits of one token a row where the model can do that.
    """
    decoder = decoder_of(module) if decoder is None else decoder
    check_layer(decoder, layer)
    place = len(_layers(decoder)) + layer if layer < 0 else layer - 1
    inner = layer != LAST and place < len(_layers(decoder)) - 1
    to_the_end = any(hasattr(p, "ds_id") for p in module.parameters())
    few = few_logits(module) if to_the_end else {}
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output if torch.is_tensor(output) else output[0])
        if not to_the_end:
            raise _Reached

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        with suppress(_Reached):
            module(**inputs, **few)
        return seen.pop()

    handle = (_layers(decoder)[place] if inner else decoder).register_forward_hook(keep)
    try:
        yield forward
    finally:
        handle.remove()
