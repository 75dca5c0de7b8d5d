"""components.yaml: which registered component a name means, and the params that its __init__ gets.

The file has the groups ``selectors``, ``mixers`` and ``weighters``; an entry is
``<name>: {name: <registered name, default: the entry's>, params: {...}}``.
"""

from __future__ import annotations

import copy
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from dataflex.config.paths import resolve
from dataflex.config.schema import FlexSection, Kind
from dataflex.config.secrets import NO_SECRET, secret_places
from dataflex.config.yaml_reader import kind_of, read_mapping
from dataflex.utils.errors import UserError, nearest

GROUPS: dict[Kind, str] = {"select": "selectors", "mix": "mixers", "weight": "weighters"}
KIND_NAMES: dict[Kind, str] = {"select": "selector", "mix": "mixer", "weight": "weighter"}
ENTRY_POINTS = "dataflex.components"


def component_params(flex: FlexSection, kind: Kind) -> tuple[str, dict[str, Any]]:
    """Return (registered name, params) of the component that ``flex`` names for ``kind``.

    The params are those of the file, and over them those of ``component_params``.

    A name that the file lacks is passed on with no params where own components may be registered
    (``component_modules`` or an entry point); else it is a UserError naming the nearest match.
    """
    wanted = flex.component(kind)
    assert wanted is not None, f"no component is configured for {kind}"
    path = resolve(flex.components_cfg_file)
    groups = read_components(path)
    entries = groups.get(GROUPS[kind], {})
    own = copy.deepcopy((flex.component_params or {}).get(kind, {}))
    if wanted in entries:
        entry = entries[wanted]
        for place in secret_places(entry["params"]):
            raise UserError(f"{path}:{wanted}.params.{place}: {NO_SECRET}")
        return str(entry.get("name", wanted)), copy.deepcopy(entry["params"] or {}) | own
    if has_own_components(flex):
        return wanted, own
    others = [group for group, names in groups.items() if wanted in names]
    hint = f" ('{wanted}' is in {others[0]})" if others else nearest(wanted, entries)
    valid = ", ".join(entries) or "none"
    raise UserError(f"'{wanted}' is not in {GROUPS[kind]} of {path}{hint}; there are: {valid}")


def has_own_components(flex: FlexSection) -> bool:
    """Whether components may be registered that are not the package's."""
    return bool(flex.component_modules or entry_points(group=ENTRY_POINTS))


def read_components(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Read and check a components file: {group: {name: {"name"?: str, "params": mapping or None}}}."""
    groups = read_mapping(path, "components file")
    errors: list[str] = []
    for group, entries in groups.items():
        if group not in GROUPS.values():
            valid = ", ".join(GROUPS.values())
            errors.append(f"{path}:{group}: unknown group, expected {valid}{nearest(group, GROUPS.values())}")
        elif entries is None:
            groups[group] = {}
        elif not isinstance(entries, dict):
            errors.append(f"{path}:{group}: expected a mapping of names, got a {kind_of(entries)}")
        else:
            errors += [f"{path}:{group}.{name}{text}" for name, e in entries.items() for text in _entry_problems(e)]
    if errors:
        raise UserError("\n".join(errors))
    return groups


def _entry_problems(entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        return [f": expected a mapping with 'params', got a {kind_of(entry)}"]
    found = [
        f".{key}: unknown key, expected name or params{nearest(str(key), ('name', 'params'))}"
        for key in entry
        if key not in ("name", "params")
    ]
    if "params" not in entry:
        found.append(": 'params' is missing, expected a mapping (params: {} for none)")
    elif not isinstance(entry["params"] or {}, dict):
        found.append(f".params: expected a mapping, got a {kind_of(entry['params'])}")
    if not isinstance(entry.get("name", ""), str):
        found.append(f".name: expected text, got a {kind_of(entry['name'])}")
    return found
