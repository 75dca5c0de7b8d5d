"""The table of small faults: a YAML file for each room, `{file: [fault, ...]}`; see `Mutant` for what a fault says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
TABLES = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Mutant:
    """A fault in ``file``: ``find``, which stands there once, becomes ``put``.

    name: what is wrong, in words; no two have the same. kind: of blind spot that it aims at. tests: files or node ids
    of pytest that must see it.
    """

    name: str
    kind: str
    file: str
    find: str
    put: str
    tests: tuple[str, ...]

    @property
    def room(self) -> str:
        """The folder or module of the package that it lies in, or ``csrc``."""
        parts = Path(self.file).with_suffix("").parts
        return parts[1] if parts[0] == "dataflex" else parts[0]


def read(folder: Path = TABLES) -> list[Mutant]:
    """All faults, in the order of the files' names."""
    tables: list[dict[str, list[dict[str, Any]]]] = [
        yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.yaml"))
    ]
    return [
        Mutant(row["fault"], row["kind"], file, row["find"], row["put"], tuple(row["tests"].split()))
        for table in tables
        for file, rows in table.items()
        for row in rows
    ]
