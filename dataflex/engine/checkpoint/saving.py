"""Writing a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dataflex import __version__
from dataflex.engine.checkpoint.manifest import MANIFEST, POINTER, STATE, Manifest, random_state_file
from dataflex.engine.checkpoint.state import encode, random_state, state_of
from dataflex.engine.loop import Loop
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.files import write_atomically
from dataflex.utils.records import FileRecord, write_sealed


def save(
    engine: Any,
    loop: Loop,
    folder: Path,
    client_state: dict[str, Any],
    *,
    point: bool = True,
    without_frozen: bool = True,
) -> None:
    """Write a checkpoint into the new ``folder``; a collective. UserError if the folder holds one already.

    point: let `POINTER` name it. without_frozen: leave out parameters that are not trained.
    """
    if dist.broadcast_object((folder / MANIFEST).exists()):
        raise UserError(f"{folder}: is a checkpoint already; a tag is never written twice")
    frozen = without_frozen and any(not p.requires_grad for p in engine.module.parameters())
    state = encode(state_of(loop) | {"client_state": client_state, "frozen": frozen})
    if dist.is_main():
        _clear(folder)
    dist.barrier()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(random_state(), folder / random_state_file(dist.rank()))
    engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=frozen)
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
        if point:
            write_atomically(folder.parent / POINTER, folder.name)
    dist.barrier()


def _clear(folder: Path) -> None:
    """Remove what a save that did not finish left in ``folder``."""
    for pattern in ("*_states.pt", "dataflex_*", ".dataflex_*"):
        for path in folder.glob(pattern):
            path.unlink()
