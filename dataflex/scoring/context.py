"""`scoring_mode`: the one state of a model in which samples may be scored under any ZeRO stage."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter requires grad inside, so no weight gradient is computed and no ZeRO hook reduces one.

    ZeRO-3 treats the blocks of mixture models as leaves, with a backward hook that makes zeros of the gradients that
    their parameters lack and reduces those: such hooks are off inside.
    """
    from deepspeed.utils import z3_leaf_module

    trainable = [p for p in module.parameters() if p.requires_grad]
    hooks = [(m, m._backward_hooks) for m in module.modules() if m._backward_hooks and z3_leaf_module(m)]
    for parameter in trainable:
        parameter.requires_grad_(False)
    for leaf, _ in hooks:
        leaf._backward_hooks = OrderedDict()
    try:
        yield
    finally:
        for leaf, own in hooks:
            leaf._backward_hooks = own
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def evaluating(module: nn.Module, *, gradients: bool) -> Iterator[None]:
    """Eval mode (no dropout), but where a backward follows activation checkpointing stays on.

    Hugging Face layers checkpoint only while their own ``training`` is true; it decides nothing else there.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    training = [m for m in module.modules() if m.training]
    module.eval()
    for m in training:
        if gradients and isinstance(m, GradientCheckpointingLayer):
            m.training = True
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def leaf_embeddings(module: nn.Module, outputs: list[torch.Tensor] | None = None) -> Iterator[None]:
    """Make every embedding's output a leaf that requires grad: the backward of activations ends there.

    outputs: a list to which each of them is added.
    """

    def detach(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_(True)
        if outputs is not None:
            outputs.append(output)
        return output

    handles = [m.register_forward_hook(detach) for m in module.modules() if isinstance(m, nn.Embedding)]
    assert handles, "the model has no nn.Embedding"
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def scoring_mode(module: nn.Module, *, gradients: bool) -> Iterator[None]:
    """Frozen and in eval mode; with ``gradients`` a backward through the activations is possible inside."""
    with evaluating(module, gradients=gradients), frozen(module):
        if gradients:
            with leaf_embeddings(module), torch.enable_grad():
                yield
        else:
            with torch.no_grad():
                yield
