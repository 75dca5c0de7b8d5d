"""The text of a format for descriptions and calls of tools, by the Jinja that a saved chat template has too."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from dataflex.data.encoding.formats import ToolFormat
from dataflex.data.sources.tool_calls import Call, Tool
from dataflex.utils.errors import UserError, brief


def macros(tools: ToolFormat) -> str:
    """Jinja macros described(tools) and called(calls)."""
    return (
        f"{{%- macro described(tools) -%}}{tools.described}{{%- endmacro -%}}\n"
        f"{{%- macro called(calls) -%}}{tools.called}{{%- endmacro -%}}\n"
    )


def described(form: ToolFormat, tools: list[Tool], where: str) -> str:
    """What is said of tools in the system text. UserError naming ``where`` if the format cannot say it."""
    return _run(form, "described", tools, where)


def called(form: ToolFormat, calls: list[Call], where: str) -> str:
    """The text of calls; errors as of `described`."""
    return _run(form, "called", calls, where)


def _run(form: ToolFormat, macro: str, value: Any, where: str) -> str:
    module = _module(form)
    try:
        return str(getattr(module, macro)(value))
    except Exception as error:  # a format is a program
        what = "the tools" if macro == "described" else "the calls of tools"
        raise UserError(f"{where}: the template's tool format cannot write {what}: {brief(error)}") from error


@cache
def _module(form: ToolFormat) -> Any:
    """The macros, made as transformers makes a chat template: in a sandbox, with the same settings and filter."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    def raise_exception(text: str) -> None:
        raise TemplateError(text)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(macros(form)).module
    except TemplateError as error:
        raise UserError(f"template: its tool format is not valid Jinja: {brief(error)}") from None
