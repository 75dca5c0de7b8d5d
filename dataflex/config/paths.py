"""Where named files are: the user's own first, then those that travel with the package (configs/)."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dataflex.utils.errors import UserError, nearest
from dataflex.utils.files import names_in

_PACKAGE = Path(__file__).resolve().parent.parent
_ZERO = re.compile(r"^ds_z(?:ero)?([0-3])(_offload)?(?:_config)?\.json$")


def packaged_folder() -> Path:
    """The folder of packaged files: ``configs`` beside the package in a checkout, inside it in a wheel."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def packaged(name: str) -> Path:
    """The packaged file meant by what follows ``configs/``, or by its last part.

    For instance "configs/models/tiny_llama", "src/dataflex/configs/components.yaml", "ds_z3_config.json".

    Raises UserError with the nearest packaged name where there is none.
    """
    found = _packaged(name)
    if found is None:
        raise UserError(
            f"no packaged file is called '{Path(name).name}'{nearest(Path(name).name, names_in(packaged_folder()))}"
        )
    return found


def resolve(name_or_path: str | Path, base: Path | None = None) -> Path:
    """An existing path (from the working folder, then from ``base``, the YAML's), else a packaged file.

    An absolute path is never replaced by a packaged file.
    Raises UserError naming the nearest file where there is none.
    """
    path = Path(name_or_path).expanduser()
    for candidate in (path, base / path) if base is not None else (path,):
        if os.path.exists(candidate):
            return candidate
    found = None if path.is_absolute() else _packaged(str(name_or_path))
    if found is not None:
        return found
    near = names_in(packaged_folder()) + names_in(path.parent)
    raise UserError(f"'{name_or_path}' does not exist{nearest(path.name, near)}")


def settle(name_or_path: str, base: Path | None) -> str:
    """A spelling of the path that no longer needs ``base``: as given, absolute, or a packaged file's name."""
    path = Path(name_or_path).expanduser()
    found = resolve(name_or_path, base)
    if found == path:
        return str(path)
    return found.name if found.parent == packaged_folder() else str(found.resolve())


def _packaged(name: str) -> Path | None:
    parts = Path(name).parts
    if not parts:
        return None
    below = parts[parts.index("configs") + 1 :] if "configs" in parts[:-1] else parts[-1:]
    match = _ZERO.match(parts[-1])
    nested, flat = Path(*below), f"ds_zero{match.group(1)}{match.group(2) or ''}.json" if match else parts[-1]
    found = (packaged_folder() / nested, packaged_folder() / flat)
    return next((path for path in found if os.path.exists(path)), None)
