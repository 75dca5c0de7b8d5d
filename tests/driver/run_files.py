"""What a run folder holds, in a form in which two runs that did the same are equal: times and places left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from dataflex.engine import checkpoint

# Times, and what was scored in them: a pass that was ended is taken up where it stood.
TIMES = re.compile(r"(elapsed_time|remaining_time|train_runtime|\w+_per_second|\w+_seconds|samples_scored)$")


def contents(folder: Path) -> dict[str, Any]:
    """{path: content} of every file but hidden ones (a lock).

    Text without times and without the folder's own name, else bytes.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."]
    return {path.relative_to(folder).as_posix(): _content(path, folder) for path in files}


def _content(path: Path, folder: Path) -> Any:
    if path.suffix == ".pt":
        with torch.serialization.safe_globals(checkpoint.deepspeed_globals()):
            return plain(torch.load(path, weights_only=True))
    if path.name == checkpoint.MANIFEST:
        manifest = json.loads(path.read_text())
        return {"step": manifest["step"], "files": list(manifest["files"])}  # the hash of a pickle is not its content's
    if path.suffix == ".jsonl":
        return [plain(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        text = path.read_text()
        found = plain(json.loads(text.replace(str(folder), "FOLDER")))
        if str(folder) in text:
            found.pop("seal", None)  # of a text that has the folder's name in it
        return found
    if path.suffix in (".yaml", ".md"):
        text = path.read_text().replace(str(folder), "FOLDER")
        text = text.replace(f"# {folder.name}\n", "# FOLDER\n")  # the card's title
        return re.sub(r"(runtime|per_second|_seconds|scored)\W.*|sha256 [0-9a-f]{16}", "", text)
    return path.read_bytes()


def plain(value: Any) -> Any:
    """Without times, and with tensors and arrays as lists."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if not TIMES.match(str(k)) and k != "clock"}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, str | bytes | int | float | None) else repr(value)
