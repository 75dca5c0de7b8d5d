"""What a row of the table is: a key, a value that is not the default, and the fact that it must make true."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dataflex.config import Config, load_config
from tests.driver.workspace import settings

# Values of these keys are files or folders of the workspace.
PLACES = (
    "model_name_or_path",
    "adapter_name_or_path",
    "reference_model_path",
    "proxy_model_name_or_path",
    "components_cfg_file",
    "component_modules",
    "resume_from_checkpoint",
    "tokenized_path",
    "features_dir",
    "output_dir",
    "dataset_dir",
    "select_dir",
    "select_from",
    "export_dir",
)


@dataclass(frozen=True)
class Row:
    """``key``: ``value`` in a config makes ``fact`` of what is built from it equal to ``right``, written by hand.

    fact: of a `Built`, to plain values. right: or a function of the workspace, where the fact is one of its files.
    """

    key: str
    value: Any
    fact: Callable[[Any], Any]
    right: Any


@dataclass(frozen=True)
class Build:
    """One thing that is built with the keys of all its rows. more: further keys that they need."""

    name: str
    rows: tuple[Row, ...]
    more: dict[str, Any] = field(default_factory=dict)

    def config(self, workspace: Path) -> Config:
        """The config as a user's YAML makes it; the workspace has the files that it names."""
        keys = {"output_dir": self.name, "max_steps": 4, "deepspeed": None, **self.more}
        keys |= {row.key: row.value for row in self.rows}
        for place in PLACES:
            if place in keys:
                keys[place] = _at(workspace, keys[place])
        path = workspace / f"{self.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        made = settings(workspace, **{key: value for key, value in keys.items() if value is not None or key in keys})
        temporary = path.with_name(f"{path.name}.{os.getpid()}")  # ranks write the same file
        temporary.write_text(yaml.safe_dump(made))
        temporary.rename(path)
        return load_config(path, quiet=True)


def _at(workspace: Path, value: Any) -> Any:
    if isinstance(value, list):
        return [_at(workspace, one) for one in value]
    return str(workspace / value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Built:
    """What was built from ``cfg``; ``engine``, ``inputs`` where it was an engine."""

    cfg: Config
    workspace: Path
    engine: Any = None
    inputs: Any = None

    @property
    def folder(self) -> Path:
        return Path(self.cfg.output.output_dir)
