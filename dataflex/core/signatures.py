"""The constructors of the package's own components, read from their sources: what they take, without their imports."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from functools import cache
from pathlib import Path

TRAIN = Path(__file__).resolve().parent.parent / "train"


class Unread:
    """Stands for a default that is no literal."""


@cache
def packaged(kind: str) -> Mapping[str, list[inspect.Parameter]]:
    """{registered name: parameters of ``__init__``} of a kind of `dataflex.core.registry.KINDS`.

    Annotations are text, as those of the classes are.
    """
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((TRAIN / kind).glob("*.py"))]
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    return {name: _parameters(cls, classes) for cls in classes.values() for name in _registered(cls, kind)}


def _registered(cls: ast.ClassDef, kind: str) -> list[str]:
    calls = [call for call in cls.decorator_list if isinstance(call, ast.Call)]
    return [str(ast.literal_eval(c.args[0])) for c in calls if ast.unparse(c.func) == f"register_{kind}"]


def _parameters(cls: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> list[inspect.Parameter]:
    """Of the class's own ``__init__``, or of that of its first base."""
    own = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    base = ast.unparse(cls.bases[0]) if cls.bases else ""
    if not own:
        return _parameters(classes[base], classes) if base in classes else []
    args = own[0].args
    missing = [None] * (len(args.posonlyargs) + len(args.args) - len(args.defaults))
    named = zip([*args.posonlyargs, *args.args], [*missing, *args.defaults], strict=True)
    found = [_parameter(arg, default, inspect.Parameter.POSITIONAL_OR_KEYWORD) for arg, default in named]
    only = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    found += [_parameter(arg, default, inspect.Parameter.KEYWORD_ONLY) for arg, default in only]
    if args.kwarg is not None:
        found.append(_parameter(args.kwarg, None, inspect.Parameter.VAR_KEYWORD))
    return found[1:]  # without self


def _parameter(arg: ast.arg, default: ast.expr | None, kind: inspect._ParameterKind) -> inspect.Parameter:
    value: object = inspect.Parameter.empty
    if default is not None:
        try:
            value = ast.literal_eval(default)
        except ValueError:
            value = Unread
    hint = inspect.Parameter.empty if arg.annotation is None else ast.unparse(arg.annotation)
    return inspect.Parameter(arg.arg, kind, default=value, annotation=hint)
