"""What may change between the start of a run and its resume, so that config.yaml says how the run was really made.

A checkpoint brings back its optimizer, schedule and plan whatever the config says: a changed key that would be read and
then not heeded is refused, one that holds from now on is said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dataflex.config import Config
from dataflex.engine import checkpoint
from dataflex.engine.folder.own_files import CONFIG
from dataflex.engine.run_config import FREE, SAID, run_config
from dataflex.utils.errors import UserError, shown
from dataflex.utils.logging import logger


def check_resume(cfg: Config, start: Path) -> None:
    """Compare ``cfg`` with what the checkpoint ``start`` was made with, as far as it lies in it or beside it.

    UserError naming every changed key that a resume would not heed, and for a run that would end before ``start``.
    """
    step = checkpoint.saved_step(start)
    if cfg.fixed_steps is not None and step > cfg.fixed_steps:
        raise UserError(f"max_steps: the run would end after {cfg.fixed_steps} steps, {start} has done {step}")
    found = next((path for path in (start / CONFIG, start.parent / CONFIG) if path.is_file()), None)
    if found is None:
        return
    changes = _changes(_read(found), cfg)
    refused = [change for key, change in changes.items() if key.split(".")[0] not in SAID]
    if refused:
        raise UserError(
            f"{'; '.join(refused)}: a resume goes on as {start} was made; put it back, or start in another output_dir"
        )
    for change in changes.values():
        logger.warning(f"{change}, heeded from this resume on")


def _read(path: Path) -> dict[str, Any]:
    """The configuration that a run wrote. UserError where it is not one, or no longer one."""
    try:
        before = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problem = f"cannot be read ({type(error).__name__})"
    else:
        if isinstance(before, dict):
            return before
        problem = f"holds no configuration but {shown(before)}"
    raise UserError(f"{path}: {problem}; what the run was made with is not known: remove the file to go on without it")


def _changes(before: dict[str, Any], cfg: Config) -> dict[str, str]:
    """What is said of each changed key that is not free. A key that ``before`` lacks has its default there."""
    now, default = _by_param(_plain(run_config(cfg))), _plain(Config().dump_flat())
    before = _by_param(before)
    keys = [key for key in [*now, *(before.keys() - now.keys())] if key not in FREE]
    pairs = {key: (before.get(key, default.get(key)), now.get(key, default.get(key))) for key in keys}
    return {key: f"{key}: was {old}, now {new}" for key, (old, new) in pairs.items() if old != new}


def _by_param(flat: dict[str, Any]) -> dict[str, Any]:
    """Every param of a component under a key of its own, ``component_params.<kind>.<param>``."""
    kinds = flat.get("component_params") or {}
    params = {f"component_params.{kind}.{key}": value for kind, own in kinds.items() for key, value in own.items()}
    return {key: value for key, value in flat.items() if key != "component_params"} | params


def _plain(flat: dict[str, Any]) -> dict[str, Any]:
    """As a YAML file holds it."""
    plain: dict[str, Any] = yaml.safe_load(yaml.safe_dump(flat))
    return plain
