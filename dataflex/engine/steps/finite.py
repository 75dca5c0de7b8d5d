"""Whether what a checkpoint or an export would hold is finite: what is not, never replaces what was saved before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataflex.utils import dist
from dataflex.utils.errors import UserError


def check_finite(engine: Any, folder: Path) -> None:
    """UserError naming what is not finite among the trained weights and the optimizer's state; a collective."""
    bad = next((name for name, value in _tensors(engine) if not bool(torch.isfinite(value).all())), None)
    found = [name for name in dist.gather_objects(bad) if name is not None]
    if found:
        raise UserError(
            f"{folder}: not saved after step {engine.global_steps}: {found[0]} is no longer finite; what was saved "
            "before stays (a lower learning_rate, or max_grad_norm, keeps a run from it)"
        )


def _tensors(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """What this rank holds, with names for a message."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            yield f"the weight {name}", getattr(parameter, "ds_tensor", parameter).detach()
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in getattr(optimizer, "state", {}).values():
        for key, value in state.items():
            if torch.is_tensor(value) and value.is_floating_point():
                yield f"the optimizer's {key}", value
