"""A cell's value as a number, as text or as the text of a message; of whatever type it is."""

from __future__ import annotations

import json
import math
from typing import Any

from dataflex.utils.errors import UserError, shown


def number_of(value: Any) -> float:
    """The number, or NaN for what is none."""
    try:
        return math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def as_text(value: Any, where: str) -> str:
    """A kept value as text; UserError for what has no text (a number of thousands of digits, endless nesting)."""
    try:
        return str(value)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: expected something that can be written as text, got {shown(value)}") from None


def content_of(content: Any, where: str) -> str:
    """The text of a message; OpenAI's list of text parts is one text."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f"{where}: only text parts are trained on, got {shown(content)}")
        return "".join(str(part) for part in parts)
    if content is not None and not isinstance(content, str):
        raise wrong_type(where, "content", "text", content)
    return content or ""


def with_calls(content: str, tool_calls: Any, where: str) -> str:
    """The text of a message and, in a line of its own, OpenAI's tool calls as JSON."""
    if not isinstance(tool_calls, list):
        raise wrong_type(where, "tool_calls", "a list of calls", tool_calls)
    calls = [call.get("function", call) if isinstance(call, dict) else call for call in tool_calls]
    try:
        made = json.dumps(calls, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise wrong_type(where, "tool_calls", "calls that JSON can hold", tool_calls) from None
    return f"{content}\n{made}" if content else made


def wrong_type(where: str, name: str, expected: str, value: Any) -> UserError:
    return UserError(f"{where}: {name}: expected {expected}, got {type(value).__name__} {shown(value)}")
