"""Safe YAML reading without PyYAML's traps.

Different from ``yaml.safe_load``: ``1e-4`` is a float; only true/false are booleans, so that ``no``, ``off``,
``yes`` and ``on`` stay text until a key's type is known; ``010``, ``1:30`` and dates stay text; a key
given twice is an error. Errors are one line: file:line, what was wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dataflex.utils.errors import UserError, cut, nearest, shown
from dataflex.utils.files import unusable_path

LARGEST_YAML = 100_000
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*\.?[eE][-+]?[0-9]+|[0-9][0-9_]*\.)$"
    r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_TRAPS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp"))


class _DuplicateKeyError(Exception):
    def __init__(self, key: object, line: int, first: int) -> None:
        super().__init__(key)
        self.key, self.line, self.first = key, line, first


class _Loader(yaml.SafeLoader):
    """SafeLoader with the resolvers above and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if isinstance(key, str) and key != "<<":
                if key in seen:
                    raise _DuplicateKeyError(key, line, seen[key])
                seen[key] = line
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _TRAPS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document. ``where`` names the source in errors (a file, or "command line:key")."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > LARGEST_YAML:
            raise UserError(f"{where}: not valid YAML: its aliases stand for more than {LARGEST_YAML:,} values")
        return loader.construct_document(node)
    except UserError:
        raise
    except _DuplicateKeyError as e:
        raise UserError(f"{where}:{e.line}: key '{cut(str(e.key))}' is given twice (first in line {e.first})") from None
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 1
        raise UserError(f"{where}:{line}: not valid YAML: {e.problem or e.context}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: lists and mappings are nested too deep") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as e:
        raise UserError(f"{where}: not valid YAML: {cut(' '.join(str(e).split()), 200)}") from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that a node stands for with its aliases written out; of an alias inside of itself more than is allowed."""
    if id(node) not in known:
        known[id(node)] = LARGEST_YAML + 1
        inner = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        parts = inner if isinstance(node, yaml.CollectionNode) else ()
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def read_text(path: Path, what: str) -> str:
    """Read a UTF-8 text file that the user named; ``what`` says which in errors ("config file", ...)."""
    problem = unusable_path(str(path))
    if problem:
        raise UserError(f"{cut(str(path), 200)}: cannot be the {what}: {problem}")
    try:
        return _read_text(path, what)
    except OSError as e:
        raise UserError(f"{path}: cannot read the {what}: {e.strerror}") from None


def _read_text(path: Path, what: str) -> str:
    if path.is_dir():
        raise UserError(f"{path}: the {what} is a folder, expected a file")
    if not path.is_file():
        folder = path.parent
        names = [p.name for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
        hint = nearest(path.name, names) if folder.is_dir() else f" (nor the folder '{folder}')"
        raise UserError(f"{path}: the {what} does not exist{hint}")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text (byte 0x{e.object[e.start]:02x})") from None


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML file whose top level must be a non-empty mapping with text keys."""
    text = read_text(path, what)
    data = parse_yaml(text, str(path))
    if data is None:
        raise UserError(f"{path}: the {what} is empty")
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected 'key: value' lines at the top level, got a {kind_of(data)}")
    for key in data:
        if not isinstance(key, str):
            raise UserError(f"{path}: key {shown(key)} is a {kind_of(key)}, expected text")
    return data


def kind_of(value: object) -> str:
    """Say in a user's words what type a YAML value has."""
    if isinstance(value, bool):
        return "true/false value"
    names = (((int, float), "number"), (str, "text"), ((list, tuple), "list"), (Mapping, "mapping"))
    found = (word for types, word in names if isinstance(value, types))
    return "null" if value is None else next(found, type(value).__name__)
