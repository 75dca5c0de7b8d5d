"""A conversation's turns as rounds: what is asked, or what tools gave back, and the answer to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dataflex.data.sources.convert import Turn
from dataflex.data.sources.tool_calls import Call, Tool, read_calls
from dataflex.utils.errors import UserError, shown

Pieces = tuple[str, ...]
"""A text as what is tokenised by itself, one after another."""
Pair = tuple[Pieces, Pieces]
"""What stands before an answer, and the answer."""


@dataclass(frozen=True)
class Round:
    """``asked``: a question, or the results of tools where ``results``. ``calls``: whether the answer calls tools."""

    asked: tuple[str, ...]
    results: bool
    answer: str
    calls: bool


@dataclass(frozen=True)
class Conversation:
    """system: None where there is no such turn."""

    system: str | None
    tools: list[Tool]
    rounds: list[Round]


def rounds_of(turns: Sequence[Turn]) -> Conversation:
    """Turns as `Converter` makes them: [system], [tools], then a question or results, and an answer, in turn."""
    rest = list(turns)
    system = rest.pop(0)[1] if rest[0][0] == "system" else None
    tools: list[Tool] = json.loads(rest.pop(0)[1]) if rest[0][0] == "tools" else []
    rounds: list[Round] = []
    asked: list[Turn] = []
    for role, text in rest:
        if role in ("assistant", "function"):
            rounds.append(Round(tuple(t for _, t in asked), asked[0][0] == "tool", text, role == "function"))
            asked = []
        else:
            asked.append((role, text))
    assert not asked and all(len(r.asked) == 1 or r.results for r in rounds), "roles alternate"
    return Conversation(system, tools, rounds)


def calls_of(answer: str, where: str) -> tuple[str, list[Call]]:
    """What stands before the calls of an answer, and the calls."""
    found = read_calls(answer)
    if found is None:
        raise UserError(f"{where}: expected a call of a function as JSON, got {shown(answer)}")
    return found


def as_messages(conversation: Conversation, where: str) -> list[list[dict[str, Any]]]:
    """The messages that a chat template takes: first the system's, then those of each round, its answer last."""
    made = [[] if conversation.system is None else [{"role": "system", "content": conversation.system}]]
    for each in conversation.rounds:
        role = "tool" if each.results else "user"
        messages: list[dict[str, Any]] = [{"role": role, "content": text} for text in each.asked]
        if each.calls:
            text, calls = calls_of(each.answer, where)
            listed = [{"type": "function", "function": call} for call in calls]
            messages.append({"role": "assistant", "content": text, "tool_calls": listed})
        else:
            messages.append({"role": "assistant", "content": each.answer})
        made.append(messages)
    return made
