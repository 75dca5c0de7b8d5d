"""Adam's moments of named parameters, read from a DeepSpeed engine at any ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dataflex.ops import Transform
from dataflex.utils.errors import UserError

_KEYS = ("exp_avg", "exp_avg_sq")


def read_moments(engine: Any, names: Iterable[str]) -> tuple[Mapping[str, tuple[Tensor, Tensor]], Transform]:
    """Return ({name: (exp_avg, exp_avg_sq)}, constants) with full tensors in the parameters' shapes.

    Nothing is read before it is asked for, nor kept: to look up a name is a collective under ZeRO, on every rank with
    the same names in the same order, and before the next optimizer step. What it gives may be the optimizer's own.
    Before the first optimizer step the moments are zero. UserError if the optimizer keeps no Adam moments.
    """
    steps = engine.global_steps - engine.skipped_steps
    constants = _constants(engine, steps)
    if steps:
        _link_every_group(engine.optimizer)
    parameters = dict(engine.module.named_parameters())
    return _EngineMoments(engine, {name: parameters[name] for name in names}, steps == 0), constants


class _EngineMoments(Mapping[str, tuple[Tensor, Tensor]]):
    def __init__(self, engine: Any, parameters: dict[str, torch.nn.Parameter], fresh: bool) -> None:
        self._engine = engine
        self._parameters = parameters
        self._fresh = fresh

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        parameter = self._parameters[name]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if self._fresh:
            zero = torch.zeros(shape, device=self._engine.device)
            return zero, zero
        with _trained(parameter):
            first, second = (_read(self._engine, parameter, key).reshape(shape) for key in _KEYS)
        return first, second

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


@contextmanager
def _trained(parameter: torch.nn.Parameter) -> Iterator[None]:
    """DeepSpeed reads no state of a parameter that is frozen, as all are in a scoring pass."""
    before = parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        yield
    finally:
        parameter.requires_grad_(before)


def _link_every_group(optimizer: Any) -> None:
    """Make every parameter's state readable under ZeRO-1 and 2, and under 1 in bf16 with gradients in fp32.

    DeepSpeed links them after the first parameter group's first step, when the others have no state yet, and
    does not link them again after a checkpoint is loaded.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    names = (("bit16_groups", "single_partition_of_fp32_groups"), ("bf16_groups", "fp32_groups_flat_partition"))
    for groups, partitions in (pair for pair in names if hasattr(optimizer, pair[1])):
        for group, partition in zip(getattr(optimizer, groups), getattr(optimizer, partitions), strict=True):
            lazy_init_hp_params_optimizer_state(group, partition, optimizer.optimizer.state)


def _constants(engine: Any, steps: int) -> Transform:
    groups = engine.optimizer.param_groups
    if "betas" not in groups[0] or "eps" not in groups[0]:
        raise UserError(
            f"gradient_type: adam needs an Adam optimizer, this run uses {type(engine.optimizer).__name__}; "
            "set gradient_type: sgd or an Adam optimizer"
        )
    beta1, beta2 = groups[0]["betas"]
    return Transform("adam", float(beta1), float(beta2), float(groups[0]["eps"]), steps)


def _read(engine: Any, parameter: torch.nn.Parameter, key: str) -> Tensor:
    """One full moment, detached, on the engine's device."""
    from deepspeed.utils import safe_get_full_optimizer_state

    value = safe_get_full_optimizer_state(parameter, key)
    if value is None:
        value = _read_unpartitioned(engine.optimizer, parameter, key)
    if value is None:
        raise UserError(f"gradient_type: the optimizer {type(engine.optimizer).__name__} keeps no '{key}'")
    return value.detach().to(engine.device, torch.float32)


def _read_unpartitioned(optimizer: Any, parameter: torch.nn.Parameter, key: str) -> Tensor | None:
    """ZeRO-0: state is keyed by the parameter, by its fp32 copy, or by a flat fp32 group that holds it."""
    state = getattr(optimizer, "optimizer", optimizer).state
    half_groups = getattr(optimizer, "fp16_groups", None)
    if half_groups is None:
        return state[parameter].get(key) if parameter in state else None
    for index, group in enumerate(half_groups):
        place = next((i for i, p in enumerate(group) if p is parameter), None)
        if place is None:
            continue
        if hasattr(optimizer, "fp32_groups_flat"):
            flat = state[optimizer.fp32_groups_flat[index]].get(key)
            start = sum(p.numel() for p in group[:place])
            return None if flat is None else flat[start : start + parameter.numel()]
        value: Tensor | None = state[optimizer.fp32_groups[index][place]].get(key)
        return value
    return None
