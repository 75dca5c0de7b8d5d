"""Files of a run that a user may also have put into output_dir: ours are known by a signature, theirs are kept."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from dataflex.core.run_files import RUN_FILES
from dataflex.utils.errors import UserError
from dataflex.utils.files import write_atomically
from dataflex.utils.logging import logger

CONFIG, CARD = "config.yaml", "README.md"
_COMMENTS = {".yaml": ("# ", ""), ".md": ("<!-- ", " -->")}
_SIGNATURE = re.compile(r"written by dataflex, sha256 ([0-9a-f]{16})")
# What a pass over the pool keeps may be there before a run.
_KEPT = ("scores", "features", "embeddings", "cache")
_NAMES = tuple(file.pattern for file in RUN_FILES if file.pattern not in _KEPT)


def write(path: Path, text: str, source: Path | None = None) -> None:
    """Write a file of ours (.yaml or .md), signed in its last line; what someone else wrote there is renamed.

    source: the config file of this run. UserError where that is ``path``, since the same command must find it again.
    """
    refuse_source(path, source)
    if path.exists() and not _is_ours(path):
        _set_aside(path)
    before, after = _COMMENTS[path.suffix]
    text = text.rstrip("\n") + "\n"
    write_atomically(path, f"{text}{before}written by dataflex, sha256 {_digest(text)}{after}\n")


def refuse_source(path: Path, source: Path | None) -> None:
    """UserError where ``path``, which is to be written, is the config file ``source``, unless a run wrote that."""
    if path.exists() and not _is_ours(path) and _same(path, source):
        raise UserError(
            f"output_dir: {path} is the config file of this run, and the run would write its effective configuration "
            "over it; give the file another name, or keep it in another folder"
        )


def refuse_theirs(folder: Path, source: Path | None) -> None:
    """UserError where a first run in ``folder`` would write over a user's files."""
    theirs = _theirs(folder, source)
    if theirs:
        names = ", ".join(path.name for path in theirs)
        raise UserError(
            f"output_dir: {folder} holds {names}, which no run has written and this one would write over; name another "
            "folder, move them, or have them renamed with overwrite_output_dir: true"
        )


def set_theirs_aside(folder: Path, source: Path | None) -> None:
    """Rename the user's files that a first run in ``folder`` would write over."""
    for path in _theirs(folder, source):
        _set_aside(path)


def _theirs(folder: Path, source: Path | None) -> list[Path]:
    found = [path for name in _NAMES for path in sorted(folder.glob(name)) if not _is_ours(path)]
    return [path for path in found if not (path.name == CONFIG and _same(path, source))]


def _same(path: Path, source: Path | None) -> bool:
    return source is not None and source.exists() and source.samefile(path)


def kept(path: Path) -> bool:
    """Before ``path``, named as a file of ours, is removed: whether it is a user's text, which is renamed instead."""
    if path.suffix not in _COMMENTS or _is_ours(path):
        return False
    _set_aside(path)
    return True


def _set_aside(path: Path) -> None:
    """Rename ``path`` to the first free of name.before, name.before2, ..."""
    number, kept = 1, path.with_name(f"{path.name}.before")
    while kept.exists():
        number += 1
        kept = path.with_name(f"{path.name}.before{number}")
    path.rename(kept)
    logger.warning(f"{path}: not written by a run; kept as {kept.name}")


def _is_ours(path: Path) -> bool:
    if path.suffix not in _COMMENTS or not path.is_file():
        return False
    *lines, last = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) or [""]
    found = _SIGNATURE.search(last)
    return found is not None and found.group(1) == _digest("".join(lines))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
