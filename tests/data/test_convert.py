"""Rows to turns: the three formats, plain text, what is refused and what is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dataflex.data.sources.convert import Converter
from dataflex.data.sources.info import Columns, DatasetInfo, Tags
from dataflex.utils.errors import UserError


def make(stage: str = "sft", weight: str | None = None, **keys: Any) -> Converter:
    return Converter(DatasetInfo(name="x", where="info:x", path=Path("x.json"), **keys), stage, weight)


def sharegpt(*messages: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in messages]}


def test_alpaca_with_everything() -> None:
    columns = Columns(system="sys", history="past", given=frozenset({"system", "history"}))
    row = {"instruction": "a", "input": "b", "output": "c", "sys": "s", "past": [["d", "e"], ["f", "g"]]}
    assert make(columns=columns)(row, "x:1").turns == (
        ("system", "s"),
        ("user", "d"),
        ("assistant", "e"),
        ("user", "f"),
        ("assistant", "g"),
        ("user", "a\nb"),
        ("assistant", "c"),
    )


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "a", "input": ""}, "a"),
        ({"instruction": "a", "input": None}, "a"),
        ({"instruction": "a"}, "a"),
        ({"instruction": "", "input": "b"}, "b"),
    ],
)
def test_alpaca_leaves_out_what_is_empty(row: dict[str, Any], prompt: str) -> None:
    assert make()(row | {"output": "c"}, "x:1").turns == (("user", prompt), ("assistant", "c"))


def test_sharegpt_with_tools_as_plain_roles() -> None:
    row = sharegpt(("system", "s"), ("human", "a"), ("function_call", "f()"), ("observation", "4"), ("gpt", "b"))
    assert make(formatting="sharegpt")(row, "x:1").turns == (
        ("system", "s"),
        ("user", "a"),
        ("assistant", "f()"),
        ("tool", "4"),
        ("assistant", "b"),
    )


def test_sharegpt_system_column_yields_to_a_system_message() -> None:
    convert = make(formatting="sharegpt", columns=Columns(system="s", given=frozenset({"system"})))
    row = sharegpt(("human", "a"), ("gpt", "b")) | {"s": "column"}
    assert convert(row, "x:1").turns[0] == ("system", "column")
    row = sharegpt(("system", "message"), ("human", "a"), ("gpt", "b")) | {"s": "column"}
    assert convert(row, "x:1").turns[0] == ("system", "message")


def test_openai_messages_with_tool_calls_and_parts() -> None:
    tags = Tags("role", "content", "user", "assistant", "tool", "function", "system")
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "c", "tool_calls": None},
        ]
    }
    convert = make(formatting="openai", columns=Columns(messages="messages"), tags=tags)
    assert convert(row, "x:1").turns == (
        ("user", "ab"),
        ("assistant", '[{"name": "f", "arguments": "{}"}]'),
        ("tool", "1\n2"),
        ("assistant", "c"),
    )


def test_plain_text() -> None:
    convert = make("pt", columns=Columns(prompt="text", given=frozenset({"prompt"})))
    assert convert.wanted == {"text"}
    assert convert({"text": "once"}, "x:1").turns == (("text", "once"),)
    assert convert({"text": ""}, "x:1").problem == "no text"
    with pytest.raises(UserError, match="'sharegpt' has no plain text for stage pt"):
        make("pt", formatting="sharegpt")


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "no messages"),
        ([("human", "a")], "does not end with an answer"),
        ([("human", "a"), ("gpt", "b"), ("human", "c")], "does not end with an answer"),
        ([("gpt", "b"), ("human", "a")], "roles do not alternate"),
        ([("human", "a"), ("human", "b"), ("gpt", "c")], "roles do not alternate"),
        ([("human", "a"), ("system", "s"), ("gpt", "c")], "a system message that is not the first"),
        ([("user", "a"), ("gpt", "b")], "unknown role 'user'"),
        ([("humam", "a"), ("gpt", "b")], "unknown role 'humam' (did you mean 'human'?)"),
        ([("human", "a"), ("gpt", "")], "no answer"),
        ([("human", "a"), ("gpt", "\ud800")], "text with half a surrogate pair"),
    ],
)
def test_unusable_conversations_get_a_reason(messages: list[tuple[str, Any]], problem: str) -> None:
    converted = make(formatting="sharegpt")(sharegpt(*messages), "x:1")
    assert (converted.turns, converted.problem) == ((), problem)


def test_a_missing_answer_gets_a_reason() -> None:
    for answer in ({}, {"output": None}, {"output": ""}):
        assert make()({"instruction": "a", **answer}, "x:1").problem == "no answer"


SHAREGPT = {"formatting": "sharegpt"}
HISTORY = {"columns": Columns(history="h", given=frozenset({"history"}))}


@pytest.mark.parametrize(
    ("keys", "row", "text"),
    [
        ({}, {"instruction": 3, "output": "a"}, "x:7: instruction: expected text, got int 3"),
        ({}, {"instruction": "a", "output": ["b"]}, "x:7: output: expected text, got list ['b']"),
        (HISTORY, {"h": [["a"]]}, "x:7: h: expected a list of [question, answer] pairs of text, got list"),
        (HISTORY, {"h": "a"}, "x:7: h: expected a list of [question, answer] pairs of text, got str 'a'"),
        (SHAREGPT, {"conversations": "a"}, "conversations: expected a list of messages, got str"),
        (SHAREGPT, {"conversations": ["a"]}, "conversations[0]: expected an object, got 'a'"),
        (
            SHAREGPT,
            {"conversations": [{"role": "human", "value": "a"}]},
            "x:7: conversations[0]: no key 'from'; it has role, value; name the keys in info:x.tags",
        ),
        (
            SHAREGPT,
            {"conversations": [{"from": "human", "valu": "a"}]},
            "no key 'value' (did you mean 'valu'?)",
        ),
        (
            SHAREGPT,
            {"conversations": [{"from": "human", "value": [{"type": "image_url"}]}]},
            "only text parts are trained on",
        ),
    ],
)
def test_wrong_types_stop_with_the_row(keys: dict[str, Any], row: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as error:
        make(**keys)(row, "x:7")
    assert text in str(error.value)


@pytest.mark.parametrize("value", [None, "much", -1, float("nan"), float("inf"), True])
def test_weights_must_be_numbers(value: Any) -> None:
    with pytest.raises(UserError, match="x:7: w: expected a number >= 0, got "):
        make(weight="w")({"instruction": "a", "output": "b", "w": value}, "x:7")


def test_a_row_without_its_weight() -> None:
    with pytest.raises(UserError, match=r"x:7: no column 'wt' \(sample_weight\); it has instruction, output"):
        make(weight="wt")({"instruction": "a", "output": "b"}, "x:7")


def test_weights_are_read_from_text_too() -> None:
    assert make(weight="w")({"instruction": "a", "output": "b", "w": "0.5"}, "x:7").weight == 0.5
