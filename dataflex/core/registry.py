"""Names to component classes, and how a class gets its arguments.

A component is built from its ``params`` in components.yaml, by name, plus the runtime objects that its
``__init__`` names (dataset, eval_dataset, tokenizer, scorer, output_dir, ...). Anything unknown or missing is
an error with the nearest match; nothing is dropped.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from dataflex.utils.errors import UserError, nearest, shown
from dataflex.utils.logging import logger

C = TypeVar("C", bound=type)
KINDS = ("selector", "mixer", "weighter")
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# The objects that every component may ask for: `HookBuilder` and `attach`, of dataflex.train.trainer, make them.
RUNTIME = (
    "dataset",
    "eval_dataset",
    "mixer_eval_dataset",
    "accelerator",
    "data_collator",
    "cache_dir",
    "output_dir",
    "tokenizer",
    "mixture_manager",
    "scorer",
    "passes",
    "reference_model_path",
    "open_reference",
    "open_head",
    "open_embedder",
)
PLAIN: dict[str, tuple[Any, str]] = {
    "bool": (bool, "true or false"),
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "str": (str, "text"),
    "None": (type(None), "null"),
}
"""Of annotations that a param's value is held against: its types, and what they are in words."""


class Registry:
    """One table of classes per kind (`selector`, `mixer`, `weighter`)."""

    def __init__(self) -> None:
        self._classes: dict[str, dict[str, type]] = {kind: {} for kind in KINDS}

    def register(self, kind: str, name: str) -> Callable[[C], C]:
        """Class decorator. ValueError for a name that is taken or not made of ``a-z 0-9 _``.

        The user's own code may take the name of a component that comes with dataflex; the log says so.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UserError(f"{kind} name {name!r}: use lower-case letters, digits and '_'")

        def decorate(cls: C) -> C:
            known = self._classes[kind].get(name)
            if known is not None and _path(known) != _path(cls):
                if not _is_packaged(known) or _is_packaged(cls):
                    raise UserError(f"{kind} '{name}' is already registered by {_path(known)}")
                logger.warning(f"{kind} '{name}': {_path(cls)} replaces {_path(known)}")
            self._classes[kind][name] = cls
            return cls

        return decorate

    def names(self, kind: str) -> list[str]:
        return sorted(self._classes[kind])

    def get(self, kind: str, name: str) -> type:
        """Return the class; ValueError that lists the valid names if there is none."""
        check_name(kind, name, self.names(kind))
        return self._classes[kind][name]

    def code_of(self, kind: str, name: str) -> str:
        """A digest of the file of a component that is the user's own; "" for those that the version tells of."""
        cls = self.get(kind, name)
        file = None if _is_packaged(cls) else inspect.getsourcefile(cls)
        return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]

    def effective(self, kind: str, name: str, params: Mapping[str, Any], runtime: Collection[str]) -> dict[str, Any]:
        """``params`` and the defaults of ``__init__`` for what they leave out, as JSON has them.

        runtime: names of the objects that a caller offers, which are no params.
        """
        found = {}
        for p in _parameters(self.get(kind, name)):
            plain = isinstance(p.default, bool | int | float | str | list | tuple | dict | None)
            if p.default is not inspect.Parameter.empty and p.name not in runtime and plain:
                found[p.name] = list(p.default) if isinstance(p.default, tuple) else p.default
        return found | dict(params)

    def build(self, kind: str, name: str, *, runtime: Mapping[str, Any], cfg: Mapping[str, Any] | None = None) -> Any:
        """Instantiate ``kind``/``name``.

        ``cfg`` holds the user's params: each must be an argument of ``__init__``. ``runtime`` holds what the
        caller offers: only what ``__init__`` names is passed; a param of that name wins unless it is null.
        """
        cls = self.get(kind, name)
        self.check(kind, name, cfg or {}, runtime)
        named = {p.name for p in _parameters(cls) if p.kind in NAMED}
        return cls(**{k: v for k, v in runtime.items() if k in named} | _given(cfg or {}, runtime))

    def check(self, kind: str, name: str, cfg: Mapping[str, Any], runtime: Collection[str]) -> None:
        """`check_params` of a component as it is registered.

        A class that itself defines ``check_values`` is then given all params, its defaults included, to refuse values.
        """
        cls = self.get(kind, name)
        check_params(kind, name, _parameters(cls), cfg, runtime)
        if "check_values" in vars(cls):
            cls.check_values(self.effective(kind, name, _given(cfg, runtime), runtime))  # type: ignore[attr-defined]


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_packaged(cls: type) -> bool:
    return cls.__module__.startswith("dataflex.")


def _parameters(cls: type) -> list[inspect.Parameter]:
    return list(inspect.signature(cls).parameters.values())


def _given(cfg: Mapping[str, Any], runtime: Collection[str]) -> dict[str, Any]:
    """The user's params but for nulls in the place of what the caller offers."""
    return {k: v for k, v in cfg.items() if not (v is None and k in runtime)}


def check_name(kind: str, name: str, valid: Collection[str]) -> None:
    """UserError where no component of ``kind`` is registered under ``name``."""
    if name not in valid:
        raise UserError(f"component_name: no {kind} '{name}'{nearest(name, valid)}; registered: {', '.join(valid)}")


def check_params(
    kind: str, name: str, parameters: Sequence[inspect.Parameter], cfg: Mapping[str, Any], runtime: Collection[str]
) -> None:
    """UserError for a param of ``cfg`` that ``__init__`` does not take, or not such a value, and for one that it lacks.

    parameters: of ``__init__``, which may have ``**kwargs``; the base classes refuse what reaches them unclaimed.
    runtime: names of what the caller offers.
    """
    named = [p for p in parameters if p.kind in NAMED]
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    given, own = _given(cfg, runtime), [p.name for p in named if p.name not in runtime]
    for key in given:
        if key not in [p.name for p in named] and not open_ended:
            raise UserError(
                f"components: {kind} '{name}': unknown param '{key}'{nearest(key, own)}; "
                f"valid: {', '.join(own) or 'none'}"
            )
    for p in named:
        valid = _misfit(p, given[p.name]) if p.name in given else None
        if valid is not None:
            raise UserError(f"components: {kind} '{name}': {p.name}: expected {valid}, got {shown(given[p.name])}")
        if p.default is inspect.Parameter.empty and p.name not in given and p.name not in runtime:
            raise UserError(f"components: {kind} '{name}': missing param '{p.name}'; set it under params")


def _misfit(param: inspect.Parameter, value: Any) -> str | None:
    """What ``value`` should be, in words, where it is not of the param's annotation; None where it is.

    Annotations of true or false, numbers and text are read, alone or with ``| None``; others are the component's own
    to check, and so are the values. A param's default is right whatever it is.
    """
    hint = param.annotation if isinstance(param.annotation, str) else inspect.formatannotation(param.annotation)
    kinds = [kind.strip() for kind in hint.split("|")]
    if not PLAIN.keys() >= set(kinds) or (value is None and param.default is None):
        return None
    fits = any(isinstance(value, PLAIN[kind][0]) and (kind == "bool" or not isinstance(value, bool)) for kind in kinds)
    return None if fits else " or ".join(PLAIN[kind][1] for kind in kinds)


REGISTRY = Registry()


def register_selector(name: str) -> Callable[[C], C]:
    """Register a `Selector` subclass under ``name``."""
    return REGISTRY.register("selector", name)


def register_mixer(name: str) -> Callable[[C], C]:
    """Register a `Mixer` subclass under ``name``."""
    return REGISTRY.register("mixer", name)


def register_weighter(name: str) -> Callable[[C], C]:
    """Register a `Weighter` subclass under ``name``."""
    return REGISTRY.register("weighter", name)
