"""Registers components: those of the package, of the user's modules, and of entry points."""

from __future__ import annotations

import hashlib
import importlib
import sys
import traceback
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from dataflex.config import Config
from dataflex.config.components import KIND_NAMES, component_params
from dataflex.config.rules.checks import OWN_COLUMNS
from dataflex.core.registry import KINDS, REGISTRY, RUNTIME
from dataflex.utils.errors import UserError


def load_components(modules: Iterable[str] = ()) -> None:
    """Import the package's components, then ``modules``, then the entry points ``dataflex.components``.

    A module is a dotted name or the path of a .py file (the config makes it absolute).
    UserError naming the entry that cannot be imported.
    """
    for kind in KINDS:
        importlib.import_module(f"dataflex.train.{kind}")
    for name in modules:
        _import(name)
    for point in entry_points(group="dataflex.components"):
        point.load()


def with_effective_params(cfg: Config) -> Config:
    """``cfg`` whose ``component_params`` are all the params of its components, defaults included, and no others.

    UserError for one that its component does not take.
    """
    found = {}
    for kind in cfg.flex.kinds:
        if cfg.flex.component(kind) is not None and not (kind == "mix" and cfg.flex.mixes_fixed):
            name, params = component_params(cfg.flex, kind)
            REGISTRY.check(KIND_NAMES[kind], name, params, RUNTIME)
            found[kind] = REGISTRY.effective(KIND_NAMES[kind], name, params, RUNTIME)
    return cfg.model_copy(update={"flex": cfg.flex.model_copy(update={"component_params": found or None})})


def subtask_column(cfg: Config) -> str | None:
    """The column of the target whose values are its subtasks: the config's key, else a param of the selector.

    UserError where they name two, or one of ours.
    """
    own, asked = None, cfg.data.subtask_column
    if "select" in cfg.flex.kinds:
        own = component_params(cfg.flex, "select")[1].get("subtask_column")
    if asked is not None and own not in (None, asked):
        raise UserError(f"subtask_column: '{asked}', and the selector's param of that name is '{own}'; keep the key")
    column = asked if own is None else str(own)
    if column in OWN_COLUMNS:
        raise UserError(f"subtask_column: '{column}' is a column of ours; give the target's another name")
    return column


def _import(name: str) -> ModuleType:
    path = Path(name).resolve()
    if name.endswith(".py") and not path.is_file():
        raise UserError(f"component_modules: no file '{name}'")
    try:
        return importlib.import_module(f"{_package_of(path.parent)}.{path.stem}" if name.endswith(".py") else name)
    except SyntaxError as exc:
        raise UserError(f"component_modules: {exc.filename}:{exc.lineno}: {exc.msg}") from exc
    except ImportError as exc:
        raise UserError(f"component_modules: cannot import '{name}'{_line_of(exc)}: {exc}") from exc


def _line_of(exc: ImportError) -> str:
    """Where the failed import stands: the last line that is not of the import machinery."""
    frames = traceback.extract_tb(exc.__traceback__)
    own = [f for f in frames if not f.filename.startswith("<") and Path(f.filename).parent.name != "importlib"]
    return f" at {own[-1].filename}:{own[-1].lineno}" if len(own) > 1 else ""


def _package_of(folder: Path) -> str:
    """Name of a package made of the files in ``folder``.

    In it ``.base_selector`` and its like are dataflex's own, so that a file written to be dropped into
    dataflex's folders loads from anywhere.
    """
    name = f"dataflex_components_{hashlib.blake2b(str(folder).encode(), digest_size=4).hexdigest()}"
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
        for kind in KINDS:
            base = f"base_{kind}"
            if not (folder / f"{base}.py").exists():
                sys.modules[f"{name}.{base}"] = importlib.import_module(f"dataflex.train.{kind}.{base}")
    importlib.invalidate_caches()
    return name
