"""A raw row becomes turns: (role, content) pairs: [system], [tools], then user or tool, and assistant or function.

A value of the wrong type stops with the row's place, since the whole column is then suspect. A row that is
well-typed but unusable (no answer, roles that do not alternate) gets a reason instead: the loader counts
these aloud. `tools` is a JSON list of descriptions; a `function` turn holds calls, as `read_calls` reads them, and is
trained; what the tools gave back are one or more `tool` turns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dataflex.data.sources.expression import Expression, is_expression
from dataflex.data.sources.info import DatasetInfo
from dataflex.data.sources.tool_calls import read_calls, read_tools
from dataflex.data.sources.values import as_text, content_of, number_of, with_calls, wrong_type
from dataflex.utils.errors import UserError, cut, listed, nearest, shown

Turn = tuple[str, str]
TEXT_ROLE = "text"
ANSWERS = ("assistant", "function")


class BadRow(Exception):
    """A well-typed row that cannot be trained on; the message is the reason that is counted."""


@dataclass(frozen=True)
class Converted:
    turns: tuple[Turn, ...]
    problem: str = ""
    weight: float = 1.0
    token_weight: tuple[float, ...] = ()
    kept: str = ""


class Converter:
    """Converts the rows of one dataset.

    Args:
        info: the dataset's entry.
        stage: `sft` (turns) or `pt` (one turn of the role `text`).
        weight_column: a column of sample weights (finite, not negative), arithmetic over columns, or None.
        token_column: a column of lists of token weights (finite, not negative), or None.
        kept_column: a column that travels with the samples as text, or None; a row without it is refused, or with
            ``kept_needed`` false has ''.
    """

    def __init__(
        self,
        info: DatasetInfo,
        stage: str,
        weight_column: str | None = None,
        token_column: str | None = None,
        kept_column: str | None = None,
        kept_needed: bool = True,
    ) -> None:
        if stage == "pt" and info.formatting != "alpaca":
            raise UserError(
                f"{info.where}.formatting: '{info.formatting}' has no plain text for stage pt; "
                'use "formatting": "alpaca" with "columns": {"prompt": "text"}'
            )
        self.info = info
        self.stage = stage
        self.weight_column = weight_column
        self.token_column = token_column
        self.expression = Expression(weight_column) if weight_column and is_expression(weight_column) else None
        self.kept_column, self.kept_needed = kept_column, kept_needed
        self.required, self.optional = self._needed_columns()

    def _needed_columns(self) -> tuple[dict[str, str], dict[str, str]]:
        columns = self.info.columns
        if self.stage == "pt":
            keys: tuple[str, ...] = ("prompt",)
            extra: tuple[str, ...] = ()
        elif self.info.formatting == "alpaca":
            keys, extra = ("prompt", "response"), ("query", "history", "system", "tools")
        else:
            keys, extra = ("messages",), ("system", "tools")
        required: dict[str, str] = {}
        optional: dict[str, str] = {}
        for key in keys + extra:
            name = getattr(columns, key)
            if name is None and key in keys:
                raise UserError(f"{self.info.where}.columns.{key}: stage {self.stage} cannot do without it")
            if name is not None:
                (required if key in keys or key in columns.given else optional)[key] = name
        if self.expression is not None:
            required |= {f"sample_weight: {name}": name for name in self.expression.columns}
        elif self.weight_column is not None:
            required["sample_weight"] = self.weight_column
        if self.token_column is not None:
            required["token_weight"] = self.token_column
        if self.kept_column is not None:
            (required if self.kept_needed else optional)["subtask_column"] = self.kept_column
        return required, optional

    @property
    def wanted(self) -> set[str]:
        """Every column that is read."""
        return {*self.required.values(), *self.optional.values()}

    def check_columns(self, found: Collection[str], where: str) -> None:
        """Raise UserError where a needed column is not among those found."""
        missing = {key: name for key, name in self.required.items() if name not in found}
        if not missing:
            return
        name = next(iter(missing.values()))
        hint = nearest(name, found)
        if self.stage == "sft" and "text" in found and self.info.formatting == "alpaca":
            hint = ' (plain text is for stage: pt with "columns": {"prompt": "text"})'
        needed = ", ".join(f"{cut(name)} ({key})" for key, name in self.required.items())
        raise UserError(
            f"{where}: no column '{cut(name)}'{hint}; it has {listed(found)}; "
            f"stage {self.stage} needs {needed}: name them in {self.info.where}.columns"
        )

    def __call__(self, row: Mapping[str, Any], where: str) -> Converted:
        """Convert one row; ``where`` (file:row) goes into the text of a UserError."""
        weight, tokens = self._weight(row, where), self._token_weight(row, where)
        try:
            if self.stage == "pt":
                turns = self._plain_text(row, where)
            elif self.info.formatting == "alpaca":
                turns = self._alpaca(row, where)
            else:
                turns = self._messages(row, where)
            kept = self._kept(row, where)
            for content in (*(content for _, content in turns), kept):
                if not content.isascii():
                    content.encode("utf-8")
        except BadRow as reason:
            return Converted((), str(reason), weight, tokens)
        except UnicodeEncodeError:
            return Converted((), "text with half a surrogate pair", weight, tokens)
        return Converted(tuple(turns), "", weight, tokens, kept)

    def _weight(self, row: Mapping[str, Any], where: str) -> float:
        if self.weight_column is None:
            return 1.0
        if self.expression is None:
            value = _cell(row, self.weight_column, "sample_weight", where)
            weight = number_of(value)
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"{where}: {cut(self.weight_column)}: expected a number >= 0, got {shown(value)}")
            return weight
        numbers = {}
        for name in self.expression.columns:
            value = _cell(row, name, "sample_weight", where)
            numbers[name] = number_of(value)
            if not math.isfinite(numbers[name]):
                raise UserError(f"{where}: {cut(name)} (in sample_weight): expected a number, got {shown(value)}")
        weight = self.expression(numbers)
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"{where}: sample_weight: '{self.weight_column}' is {weight:g}, expected a number >= 0")
        return weight

    def _token_weight(self, row: Mapping[str, Any], where: str) -> tuple[float, ...]:
        if self.token_column is None:
            return ()
        values = _cell(row, self.token_column, "token_weight", where)
        if not isinstance(values, list):
            raise wrong_type(where, self.token_column, "a list of numbers", values)
        weights = tuple(number_of(value) for value in values)
        for place, weight in enumerate(weights):
            if not (math.isfinite(weight) and weight >= 0):
                got = f"got {shown(values[place])} at {place}"
                raise UserError(f"{where}: {self.token_column}: expected numbers >= 0, {got}")
        return weights

    def _kept(self, row: Mapping[str, Any], where: str) -> str:
        """The row's value of the column that is kept, as text."""
        column = self.kept_column
        if column is None:
            return ""
        value = _cell(row, column, "subtask_column", where) if self.kept_needed else row.get(column)
        text = "" if value is None else as_text(value, f"{where}: {column}")
        if self.kept_needed and not text.strip():
            raise UserError(f"{where}: {column}: has no value; every row of the target needs one (subtask_column)")
        return text if text.strip() else ""

    def _text(self, row: Mapping[str, Any], key: str, where: str) -> str | None:
        name = self.required.get(key) or self.optional.get(key)
        value = row.get(name) if name is not None else None
        if value is not None and not isinstance(value, str):
            raise wrong_type(where, str(name), "text", value)
        return value

    def _plain_text(self, row: Mapping[str, Any], where: str) -> list[Turn]:
        text = self._text(row, "prompt", where)
        if not text:
            raise BadRow("no text")
        return [(TEXT_ROLE, text)]

    def _alpaca(self, row: Mapping[str, Any], where: str) -> list[Turn]:
        prompt, query = self._text(row, "prompt", where), self._text(row, "query", where)
        answer, system = self._text(row, "response", where), self._text(row, "system", where)
        turns = self._opening(system, row, where)
        for question, reply in self._history(row, where):
            turns += [("user", question), ("assistant", reply)]
        if not answer:
            raise BadRow("no answer")
        return [*turns, ("user", "\n".join(part for part in (prompt, query) if part)), ("assistant", answer)]

    def _history(self, row: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
        name = self.required.get("history")
        value = row.get(name) if name is not None else None
        if value is None or value == "":
            return []
        pairs: list[Any] = value if isinstance(value, list) else [None]
        for pair in pairs:
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
                raise wrong_type(where, str(name), "a list of [question, answer] pairs of text", value)
        return [(question, answer) for question, answer in pairs]

    def _messages(self, row: Mapping[str, Any], where: str) -> list[Turn]:
        name = self.required["messages"]
        messages = row.get(name)
        if messages is None:
            raise BadRow("no messages")
        if not isinstance(messages, list):
            raise wrong_type(where, name, "a list of messages", messages)
        turns = [self._message(message, f"{where}: {name}[{i}]") for i, message in enumerate(messages)]
        system = self._text(row, "system", where)
        if turns and turns[0][0] == "system":
            system, turns = turns[0][1], turns[1:]
        _check_order([role for role, _ in turns])
        return self._opening(system, row, where) + turns

    def _opening(self, system: str | None, row: Mapping[str, Any], where: str) -> list[Turn]:
        """The turns before the conversation: the system text, and the tools that are described in it."""
        name = self.required.get("tools") or self.optional.get("tools")
        value = row.get(name) if name is not None else None
        if not isinstance(value, str | list | dict | None):
            raise wrong_type(where, str(name), "a JSON list of tools", value)
        tools = read_tools(value)
        if tools is None:
            raise BadRow("tools that are no JSON list of named functions")
        opening = [("system", system)] if system else []
        return [*opening, ("tools", json.dumps(tools, ensure_ascii=False))] if tools else opening

    def _message(self, message: Any, where: str) -> Turn:
        tags = self.info.tags
        if not isinstance(message, dict):
            raise UserError(f"{where}: expected an object, got {shown(message)}")
        for tag in (tags.role_tag, tags.content_tag):
            if tag not in message and not (tag == tags.content_tag and message.get("tool_calls")):
                raise UserError(
                    f"{where}: no key '{tag}'{nearest(tag, message)}; it has {listed(message)}; "
                    f"name the keys in {self.info.where}.tags"
                )
        roles = {
            tags.user_tag: "user",
            tags.assistant_tag: "assistant",
            tags.function_tag: "function",
            tags.observation_tag: "tool",
            tags.system_tag: "system",
        }
        given = message[tags.role_tag]
        role = roles.get(given) if isinstance(given, str) else None
        if role is None:
            raise BadRow(f"unknown role {shown(given)}{nearest(given, roles)}")
        content = content_of(message.get(tags.content_tag), where)
        if message.get("tool_calls") and role in ANSWERS:
            role, content = "function", with_calls(content, message["tool_calls"], where)
        if not content and role != "tool" and role != "system":
            raise BadRow("an empty question" if role == "user" else "no answer")
        if role == "function" and read_calls(content) is None:
            raise BadRow("a function call that is no JSON with name and arguments")
        return role, content


def _cell(row: Mapping[str, Any], name: str, key: str, where: str) -> Any:
    """The row's value in a column that ``key`` names; UserError where it has none."""
    if name not in row:
        raise UserError(f"{where}: no column '{cut(name)}' ({key}){nearest(name, row)}; it has {listed(row)}")
    return row[name]


def _check_order(roles: list[str]) -> None:
    if not roles:
        raise BadRow("no messages")
    if "system" in roles:
        raise BadRow("a system message that is not the first")
    rounds = [role for before, role in zip(["", *roles], roles, strict=False) if not before == role == "tool"]
    for i, role in enumerate(rounds):
        if (role in ANSWERS) != (i % 2 == 1):
            raise BadRow("roles do not alternate")
    if roles[-1] not in ANSWERS:
        raise BadRow("does not end with an answer")
