"""Which checkpoints are whole: the manifest beside the files, and the newest folder that agrees with its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

from dataflex.utils import dist
from dataflex.utils.files import sha256_of
from dataflex.utils.logging import logger

STATE = "dataflex_state.pt"
MANIFEST = "dataflex_manifest.json"
POINTER = "latest"


def newest_whole(directory: Path) -> Path | None:
    """The whole checkpoint with the most steps in ``directory``, the same on every rank; None if none is."""
    return dist.broadcast_object(newest_whole_here(directory) if dist.is_main() else None)


def newest_whole_here(directory: Path) -> Path | None:
    """`newest_whole` without its broadcast, for code that runs on one rank."""
    folders = [p for p in directory.glob("*") if p.is_dir() and (p / STATE).exists()]
    folders += [p for p in directory.glob("checkpoint-*") if p.is_dir() and p not in folders]
    for folder in sorted(folders, key=step_of, reverse=True):
        problem = broken(folder)
        if problem is None:
            return folder
        logger.warning(f"{folder}: not a whole checkpoint, passed over: {problem}")
    return None


def broken(folder: Path) -> str | None:
    """Why ``folder`` is not a whole checkpoint, or None if it is: compares every file with the manifest."""
    if not folder.is_dir():
        return "there is no such checkpoint"
    if not (folder / MANIFEST).exists():
        return f"it has no {MANIFEST} (the save did not finish)"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError) as exc:
        return f"{MANIFEST} cannot be read ({type(exc).__name__})"
    for name, expected in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"] or sha256_of(path) != expected["sha256"]:
            return f"{name} differs from what was saved"
    return None


def step_of(folder: Path) -> int:
    """The number at the end of a checkpoint folder's name, -1 without one."""
    digits = re.search(r"(\d+)$", folder.name)
    return int(digits.group(1)) if digits else -1
