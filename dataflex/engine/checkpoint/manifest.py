"""Which checkpoints are whole: the manifest beside the files, and the newest folder that agrees with its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dataflex.utils import dist
from dataflex.utils.files import names_in
from dataflex.utils.logging import logger
from dataflex.utils.records import DamagedError, FileRecord, InnerPath, Record, read_sealed

STATE = "dataflex_state.pt"
MANIFEST = "dataflex_manifest.json"
POINTER = "latest"


class Manifest(Record):
    """What a checkpoint holds. step: optimizer steps done. dataflex: the version. files: every other file."""

    step: Annotated[int, Field(ge=0)]
    world_size: Annotated[int, Field(ge=1)]
    dataflex: str
    files: dict[InnerPath, FileRecord]


def random_state_file(rank: int) -> str:
    """The name of the file with the random state of ``rank``."""
    return f"dataflex_random_rank{rank}.pt"


def latest(directory: Path) -> Path | None:
    """The checkpoint that `POINTER` names, the same on every rank; None without one.

    Where that is one of dataflex's and broken, or nothing in ``directory``, the newest whole one.
    """
    return dist.broadcast_object(_latest_here(directory) if dist.is_main() else None)


def _latest_here(directory: Path) -> Path | None:
    if not (directory / POINTER).exists():
        return None
    folder = pointed_to(directory)
    if folder is None:
        logger.warning(f"{directory / POINTER}: names nothing in its folder, passed over")
    elif is_plain(folder) or broken(folder) is None:
        return folder
    return newest_whole_here(directory)


def pointed_to(directory: Path) -> Path | None:
    """What `POINTER` in ``directory`` names, if that is a name in it; whatever else may be written there is None."""
    try:
        name = (directory / POINTER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return directory / name if name in names_in(directory) else None


def is_plain(folder: Path) -> bool:
    """Whether DeepSpeed wrote a checkpoint into ``folder`` and dataflex wrote nothing."""
    return any(folder.glob("*_model_states.pt")) and not any(folder.glob("*dataflex_*"))


def newest_whole(directory: Path) -> Path | None:
    """The whole checkpoint with the most steps in ``directory``, the same on every rank; None if none is."""
    return dist.broadcast_object(newest_whole_here(directory) if dist.is_main() else None)


def newest_whole_here(directory: Path) -> Path | None:
    """`newest_whole` without its broadcast, for code that runs on one rank.

    The steps are those that the manifests name, so a folder may have any name.
    """
    named = [p for p in directory.glob("*") if not p.name.startswith(".")]  # hidden ones are being removed
    folders = [p for p in named if p.is_dir() and (p / STATE).exists()]
    folders += [p for p in directory.glob("checkpoint-*") if p.is_dir() and p not in folders]
    found = [(read_manifest(folder), folder) for folder in folders]
    steps = {folder: step_of(folder) if isinstance(content, str) else content.step for content, folder in found}
    for folder in sorted(folders, key=lambda p: (steps[p], step_of(p)), reverse=True):
        problem = broken(folder)
        if problem is None:
            return folder
        logger.warning(f"{folder}: not a whole checkpoint, passed over: {problem}")
    return None


def read_manifest(folder: Path) -> Manifest | str:
    """A checkpoint's manifest, or why there is none that can be used."""
    if not folder.is_dir():
        return "there is no such checkpoint"
    if is_plain(folder):
        return (
            "it is a checkpoint of DeepSpeed's own, without what dataflex needs; train can start from it, nothing else"
        )
    if not (folder / MANIFEST).exists():
        return f"it has no {MANIFEST} (the save did not finish)"
    try:
        manifest = read_sealed(folder / MANIFEST, Manifest)
    except DamagedError as error:
        return str(error)
    needed = {STATE, *(random_state_file(rank) for rank in range(manifest.world_size))}
    missing = sorted(needed - manifest.files.keys())
    return f"{MANIFEST} does not name {missing[0]}" if missing else manifest


def broken(folder: Path) -> str | None:
    """Why ``folder`` is not a whole checkpoint, or None if it is: compares every file with the manifest."""
    manifest = read_manifest(folder)
    if isinstance(manifest, str):
        return manifest
    differences = (record.differs(folder / name) for name, record in manifest.files.items())
    return next((problem for problem in differences if problem), None)


def unfinished(folder: Path) -> bool:
    """Whether ``folder`` holds parts of a checkpoint whose save, or whose removal by other means, did not finish."""
    parts = ("dataflex_*", "*_states.pt", "*/*_states.pt")
    return not (folder / MANIFEST).exists() and any(next(folder.glob(part), None) for part in parts)


def saved_step(folder: Path) -> int:
    """Optimizer steps that a checkpoint was saved after: of its manifest, else by its name."""
    manifest = read_manifest(folder)
    return step_of(folder) if isinstance(manifest, str) else manifest.step


def step_of(folder: Path) -> int:
    """The number at the end of a checkpoint folder's name, -1 without one."""
    digits = re.search(r"(\d+)$", folder.name)
    return int(digits.group(1)) if digits else -1
