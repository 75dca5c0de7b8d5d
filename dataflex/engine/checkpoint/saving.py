"""Writing a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dataflex import __version__
from dataflex.engine.checkpoint.manifest import MANIFEST, POINTER, STATE, Manifest, random_state_file
from dataflex.engine.checkpoint.state import encode, random_state, state_of
from dataflex.engine.models.export import size_of
from dataflex.engine.steps.finite import check_finite
from dataflex.engine.steps.loop import Loop
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.files import write_atomically
from dataflex.utils.records import FileRecord, write_sealed
from dataflex.utils.room import check_room, said_when_full


def save(
    engine: Any,
    loop: Loop,
    folder: Path,
    client_state: dict[str, Any],
    *,
    point: bool = True,
    without_frozen: bool = True,
) -> None:
    """Write a checkpoint into the new ``folder``; a collective.

    UserError if the folder holds one already, and where weights or the optimizer's state are not finite.
    point: let `POINTER` name it. without_frozen: leave out parameters that are not trained.
    """
    if dist.broadcast_object((folder / MANIFEST).exists()):
        raise UserError(f"{folder}: is a checkpoint already; a tag is never written twice")
    check_finite(engine, folder)
    frozen = without_frozen and any(not p.requires_grad for p in engine.module.parameters())
    wanted = sum(dist.gather_objects(_bytes_here(engine)))
    dist.together(lambda: check_room(folder, wanted, "a checkpoint"))
    state = encode(state_of(loop) | {"client_state": client_state, "frozen": frozen})
    if dist.is_main():
        _clear(folder)
    dist.barrier()
    with said_when_full(folder, "the checkpoint"):
        _write(engine, loop, folder, state)
        if point and dist.is_main():
            write_atomically(folder.parent / POINTER, folder.name)
    dist.barrier()


def _write(engine: Any, loop: Loop, folder: Path, state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(random_state(), folder / random_state_file(dist.rank()))
    engine.save_checkpoint(
        str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=state["frozen"]
    )
    if dist.is_main():
        torch.save(state, folder / STATE)
    dist.barrier()
    if dist.is_main():
        files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        manifest = Manifest(
            step=loop.run.step,
            world_size=dist.world_size(),
            dataflex=__version__,
            files={name: FileRecord.of(path) for name, path in files.items()},
        )
        write_sealed(folder / MANIFEST, manifest.model_dump())


def _bytes_here(engine: Any) -> int:
    """About how many bytes of a checkpoint come from this rank: its optimizer state; on rank 0 also the weights."""
    inner = getattr(engine.optimizer, "optimizer", None) or engine.optimizer
    tensors = [value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    if engine.zero_optimization_stage() > 0:  # the optimizer has a copy of its own
        tensors += [p for group in inner.param_groups for p in group["params"]]
    weights = [size_of(p) for p in engine.module.parameters() if p.requires_grad] if dist.is_main() else []
    return sum(t.numel() * t.element_size() for t in tensors) + sum(weights)


def _clear(folder: Path) -> None:
    """Remove what a save that did not finish left in ``folder``."""
    for pattern in ("*_states.pt", "dataflex_*", ".dataflex_*"):
        for path in folder.glob(pattern):
            path.unlink()
