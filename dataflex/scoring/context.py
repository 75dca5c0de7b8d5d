"""`scoring_mode`: the one state of a model in which samples may be scored under any ZeRO stage."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from dataflex.utils.errors import UserError


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
    """Eval mode (no dropout), but where a backward follows activation checkpointing stays on."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with _checkpointing(module) if gradients else nullcontext():
            yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def _checkpointing(module: nn.Module) -> Iterator[None]:
    """Hugging Face layers that are set to checkpoint do so in eval mode too.

    They ask their own ``training`` whether to, and some (OPT, Falcon, DBRX) whether to drop out as well. So it is true
    where the layer is called and false in what the checkpoint runs, when it is recomputed too.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    every = (m for m in module.modules() if isinstance(m, GradientCheckpointingLayer))
    layers: list[Any] = [m for m in every if m.gradient_checkpointing]
    checkpoints = [layer._gradient_checkpointing_func for layer in layers]
    for layer, checkpoint in zip(layers, checkpoints, strict=True):
        layer.training = True
        layer._gradient_checkpointing_func = partial(_checkpoint_in_eval, layer, checkpoint)
    try:
        yield
    finally:
        for layer, checkpoint in zip(layers, checkpoints, strict=True):
            layer.training = False
            layer._gradient_checkpointing_func = checkpoint


def _checkpoint_in_eval(layer: nn.Module, checkpoint: Callable[..., Any], run: Callable[..., Any], *args: Any) -> Any:
    """Call ``checkpoint(run, *args)``; ``layer`` is in eval mode inside ``run``."""

    def in_eval(*inputs: Any) -> Any:
        layer.training = False
        try:
            return run(*inputs)
        finally:
            layer.training = True

    return checkpoint(in_eval, *args)


@contextmanager
def leaf_embeddings(module: nn.Module, outputs: list[torch.Tensor] | None = None) -> Iterator[None]:
    """Make every embedding's output a leaf that requires grad: the backward of activations ends there.

    outputs: a list to which each of them is added, to find its grad in. What goes on is a copy, since a model may
    change it in place.
    """

    def detach(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_(True)
        if outputs is not None:
            output.retain_grad()  # a hook of checkpointing or of ZeRO-3 may have made it require grad already
            outputs.append(output)
        return output.clone()

    handles = [m.register_forward_hook(detach) for m in module.modules() if isinstance(m, nn.Embedding)]
    if not handles:
        raise UserError("gradient features: the model has no nn.Embedding, above which they are made")
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


def release_gathered(engine: Any) -> None:
    """End a scoring pass on a DeepSpeed engine: under ZeRO-3 give back the parameters that it left gathered.

    DeepSpeed prefetches by the order of modules that it recorded, and keeps what each step of it may release in a
    functools.lru_cache that outlives the order. A forward pass at the start of a run would leave "released before the
    backward" there for good. So both go, and training records its own order.
    """
    engine.empty_partition_cache()
    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    if offload is None:
        return
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    _clear_caches(type(coordinator))


def _clear_caches(cls: type) -> None:
    """Clear every functools.lru_cache of a class's methods, those inside another decorator too."""
    for method in vars(cls).values():
        inner = inspect.getclosurevars(method).nonlocals.values() if inspect.isfunction(method) else ()
        for function in (method, *inner):
            if hasattr(function, "cache_clear"):
                function.cache_clear()
