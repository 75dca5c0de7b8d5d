"""A table of the components' params: each has a test of what it changes; a param without one fails."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from dataflex.core.registry import REGISTRY
from dataflex.train.trainer.components import RUNTIME, load_components

Option = tuple[str, str, str]
Check = Callable[[], None]
OPTIONS: dict[Option, Check] = {}


def option(kind: str, name: str, *params: str) -> Callable[[Check], Check]:
    """The decorated function tests what these params of a component do."""

    def keep(check: Check) -> Check:
        for param in params:
            assert (kind, name, param) not in OPTIONS, f"{kind} {name}: {param} has two rows"
            OPTIONS[kind, name, param] = check
        return check

    return keep


def all_params(kind: str) -> set[Option]:
    """(kind, name, param) of every component that comes with dataflex."""
    load_components()
    found: set[Option] = set()
    for name in REGISTRY.names(kind):
        cls = REGISTRY.get(kind, name)
        if cls.__module__.startswith("dataflex."):
            parameters = inspect.signature(cls).parameters.values()
            named = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
            found |= {(kind, name, param) for param in named - set(RUNTIME)}
    return found
