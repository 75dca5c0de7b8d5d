"""Rows to turns: the three formats, plain text, what is refused and what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dataflex.data.sources.convert import Converter
from dataflex.data.sources.info import Columns, DatasetInfo, Tags
from dataflex.data.sources.tool_calls import read_calls
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


CALL = '{"name": "f", "arguments": {}}'
TOOL = {"name": "f", "parameters": {}}
WRAPPED = '[{"type": "function", "function": {"name": "f", "parameters": {}}}]'
TOOLS = {"columns": Columns(tools="t", given=frozenset({"tools"})), "formatting": "sharegpt"}


def test_sharegpt_with_tools() -> None:
    row = sharegpt(("system", "s"), ("human", "a"), ("function_call", CALL), ("observation", "4"), ("gpt", "b"))
    assert make(**TOOLS)(row | {"t": json.dumps([TOOL])}, "x:1").turns == (
        ("system", "s"),
        ("tools", WRAPPED),
        ("user", "a"),
        ("function", CALL),
        ("tool", "4"),
        ("assistant", "b"),
    )


@pytest.mark.parametrize("cell", [WRAPPED, [TOOL], TOOL, json.loads(WRAPPED), json.dumps(TOOL)])
def test_tools_as_text_or_objects(cell: Any) -> None:
    row = sharegpt(("human", "a"), ("function_call", CALL)) | {"t": cell}
    assert make(**TOOLS)(row, "x:1").turns[0] == ("tools", WRAPPED)


@pytest.mark.parametrize("cell", ["", " ", None, "[]", []])
def test_a_cell_without_tools_is_nothing(cell: Any) -> None:
    row = sharegpt(("human", "a"), ("gpt", "b")) | {"t": cell}
    assert make(**TOOLS)(row, "x:1").turns == (("user", "a"), ("assistant", "b"))


@pytest.mark.parametrize("cell", ["f", "[1]", '[{"description": "f"}]', [{"type": "function"}], "3"])
def test_other_tools_give_a_reason(cell: Any) -> None:
    row = sharegpt(("human", "a"), ("gpt", "b")) | {"t": cell}
    assert make(**TOOLS)(row, "x:1").problem == "tools that are no JSON list of named functions"


def test_alpaca_has_tools_too() -> None:
    columns = Columns(tools="t", given=frozenset({"tools"}))
    row = {"instruction": "a", "output": "c", "t": json.dumps([TOOL])}
    assert make(columns=columns)(row, "x:1").turns == (("tools", WRAPPED), ("user", "a"), ("assistant", "c"))


@pytest.mark.parametrize(
    ("text", "around", "names"),
    [
        (CALL, "", ["f"]),
        (f"\n[{CALL}, {CALL}]\n", "", ["f", "f"]),
        (f"<think>\n{{x}}\n</think>\n\n{CALL}", "<think>\n{x}\n</think>\n\n", ["f"]),
        (f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>", "", ["f", "f"]),
        (f"so<tool_call>{CALL}</tool_call>", "so", ["f"]),
        ('{"function": {"name": "f", "arguments": "{}"}}', "", ["f"]),
    ],
)
def test_calls_of_a_turn(text: str, around: str, names: list[str]) -> None:
    found = read_calls(text)
    assert found is not None and found[0] == around
    assert found[1] == [{"name": name, "arguments": {}} for name in names]


@pytest.mark.parametrize(
    "text",
    ["f()", "[]", '{"name": "f"}', '{"name": "f", "arguments": "x"}', f"<tool_call>{CALL}, </tool_call>", "[" * 9999],
)
def test_what_is_no_call(text: str) -> None:
    assert read_calls(text) is None


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
        ("function", '[{"name": "f", "arguments": "{}"}]'),
        ("tool", "1"),
        ("tool", "2"),
        ("assistant", "c"),
    )
    row["messages"][1] = {"role": "assistant", "content": "so", "tool_calls": [call]}
    assert convert(row, "x:1").turns[1] == ("function", 'so\n[{"name": "f", "arguments": "{}"}]')
    del row["messages"][1]["content"]
    assert convert(row, "x:1").turns[1] == ("function", '[{"name": "f", "arguments": "{}"}]')


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
        ([("human", "a"), ("function_call", "f()")], "a function call that is no JSON with name and arguments"),
        ([("observation", "a"), ("observation", "b"), ("human", "c"), ("gpt", "d")], "roles do not alternate"),
        ([("human", "a"), ("gpt", "\ud800")], "text with half a surrogate pair"),
    ],
)
def test_unusable_conversations_get_a_reason(messages: list[tuple[str, Any]], problem: str) -> None:
    converted = make(formatting="sharegpt")(sharegpt(*messages), "x:1")
    assert (converted.turns, converted.problem) == ((), problem)


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_row_without_its_subtask_stops_with_the_row(value: Any) -> None:
    kept = Converter(make().info, "sft", kept_column="task")
    row = {"instruction": "q", "output": "a"}
    assert kept(row | {"task": 0}, "x.jsonl:4").kept == "0"
    with pytest.raises(UserError, match="^x.jsonl:4: task: has no value; every row of the target needs one"):
        kept(row | {"task": value}, "x.jsonl:4")
    with pytest.raises(UserError, match=r"^x.jsonl:4: no column 'task' \(subtask_column\); it has instruction, output"):
        kept(row, "x.jsonl:4")


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
        (
            TOOLS,
            {"t": 3, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "x:7: t: expected a JSON list of tools, got int 3",
        ),
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
