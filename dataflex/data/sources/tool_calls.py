"""Tools as rows hold them, in JSON: their descriptions, and the calls of a turn."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any

Call = dict[str, Any]
Tool = dict[str, Any]
_MARKED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_MAY_BEGIN = re.compile(r"(?:\A|(?<=[>\n]))[\[{]")
_MOST_TRIED = 50


def read_calls(text: str) -> tuple[str, list[Call]] | None:
    """What stands around the calls of a turn (a thought), and the calls, each its name and arguments; None of no call.

    The calls are JSON, one object or a list, at the end of the text; or each is between <tool_call> and </tool_call>.
    """
    marked = _MARKED.findall(text)
    if marked:
        calls = [call for body in marked for call in _calls(_parsed(body))]
        around = _MARKED.sub("", text)
        return (around if around.strip() else "", calls) if len(calls) >= len(marked) else None
    text = text.strip()
    for begin in islice(_MAY_BEGIN.finditer(text), _MOST_TRIED):
        calls = _calls(_parsed(text[begin.start() :]))
        if calls:
            return text[: begin.start()], calls
    return None


def read_tools(value: Any) -> list[Tool] | None:
    """The descriptions of tools that a cell holds, as JSON text or as objects, each {"type", "function"}; [] of none.

    None where the cell holds something else.
    """
    if isinstance(value, str):
        value = _parsed(value) if value.strip() else []
    tools = [] if value is None else [value] if isinstance(value, dict) else value
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return None
    tools = [tool if tool.get("type") == "function" else {"type": "function", "function": tool} for tool in tools]
    functions = [tool.get("function") for tool in tools]
    named = all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions)
    return tools if named else None


def _parsed(text: str) -> Any:
    """The value of JSON text, False of other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return False


def _calls(value: Any) -> list[Call]:
    """The calls that a JSON value is; [] where it is something else."""
    made = []
    for call in value if isinstance(value, list) else [value]:
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            call = call["function"]
        arguments = call.get("arguments") if isinstance(call, dict) else None
        if isinstance(arguments, str):  # OpenAI's own form
            arguments = _parsed(arguments)
        if not (isinstance(arguments, dict) and isinstance(call.get("name"), str)):
            return []
        made.append({"name": call["name"], "arguments": arguments})
    return made
