"""Conversations and settings under which templates are compared with LLaMA-Factory, and how dataflex encodes them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from dataflex.data.encoding.formats import Format, find_format
from dataflex.data.encoding.template import BuiltInTemplate
from dataflex.data.encoding.tokenize import Encoder, Settings
from dataflex.data.sources.convert import Converter
from dataflex.data.sources.info import DatasetInfo, read_dataset_infos

MERGES = Path(__file__).parent / "llamafactory_merges.txt"
SPECIAL = (
    "<pad> <s> </s> <eos> <think> </think> <|im_start|> <|im_end|> <|im_sep|> <|start_header_id|> <|end_header_id|> "
    "<|eot_id|> <|eom_id|> <start_of_turn> <end_of_turn> <|user|> <|assistant|> <|system|> <|observation|> <|end|> "
    "[gMASK] <sop> <|start|> <|message|> <|channel|> <｜User｜> <｜Assistant｜>"
)
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
TAGS |= {"observation_tag": "tool", "function_tag": "function", "system_tag": "system"}
ENTRIES: dict[str, dict[str, Any]] = {
    "alpaca": {
        "file_name": "x.json",
        "columns": {
            "prompt": "question",
            "query": "more",
            "response": "answer",
            "system": "rules",
            "history": "before",
        },
    },
    "sharegpt": {
        "file_name": "x.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "system": "rules", "tools": "tools"},
    },
    "openai": {
        "file_name": "x.json",
        "formatting": "openai",
        "columns": {"messages": "turns", "tools": "tools"},
        "tags": TAGS,
    },
}


@dataclass(frozen=True)
class Case:
    """A row of a dataset of an entry of `ENTRIES`, and the settings that differ from the usual."""

    entry: str
    row: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def thinks(self) -> bool:
        return bool(self.settings.get("enable_thinking", True))

    def under(self, **settings: Any) -> Case:
        return replace(self, settings={**self.settings, **settings})


def _chat(*turns: tuple[str, str], rules: str = "", tools: str = "") -> Case:
    return Case("sharegpt", {"turns": [{"from": r, "value": t} for r, t in turns], "rules": rules, "tools": tools})


TOOLS = [
    {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"type": "string", "description": "Its name.", "enum": ["Rome", "Köln"]},
                "days": {"type": "array", "description": "Which.", "items": {"type": "integer"}},
            },
            "required": ["town"],
        },
    },
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {"properties": {}}}},
]
CALL = {"name": "weather", "arguments": {"town": "Köln", "days": [1, 2]}}
NOW = {"name": "now", "arguments": {}}
PLAIN = Case("alpaca", {"question": "Add.\n", "more": "1 and 2", "answer": "3", "rules": "", "before": []})
SYSTEM = Case("alpaca", {**PLAIN.row, "rules": "Be brief."})
HISTORY = Case("alpaca", {**PLAIN.row, "before": [["one\n\n", "two. "], ["#three", "\nfour"]]})
TURNS = _chat(("human", "What is a\nplan?"), ("gpt", "A list of steps."), ("human", "And then?"), ("gpt", "U turn"))
TURNS_SYSTEM = _chat(*[(m["from"], m["value"]) for m in TURNS.row["turns"]], rules="Be kind")
THOUGHTS = _chat(
    ("human", "1+1?"),
    ("gpt", "<think>\nadd\n</think>\n\n2"),
    ("human", "2+2?"),
    ("gpt", "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>4"),
    ("human", "3+3?"),
    ("gpt", "6"),
)
CALLED = (
    ("human", "Weather?"),
    ("function_call", json.dumps(CALL, ensure_ascii=False)),
    ("observation", '{"sun": true}'),
    ("gpt", "Sunny."),
)
OPENAI = Case(
    "openai",
    {
        "turns": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "content": "20"},
            {"role": "tool", "content": "21"},
            {"role": "assistant", "content": "20 or 21.", "tool_calls": None},
        ],
        "tools": TOOLS,
    },
)
ONE_TOOL = _chat(*CALLED, tools=json.dumps(TOOLS[:1], ensure_ascii=False))
ALL_TOOLS = _chat(*CALLED, rules="Be brief.", tools=json.dumps(TOOLS))
TWO_CALLS = _chat(
    CALLED[0], ("function_call", json.dumps([CALL, NOW])), *CALLED[2:], tools=json.dumps(TOOLS, ensure_ascii=False)
)
THOUGHT_CALL = _chat(CALLED[0], ("function_call", f"<think>\nhm\n</think>\n\n{json.dumps(NOW)}"), *CALLED[2:])
NO_TOOLS = _chat(*CALLED, tools="[]")
_LONG = (TURNS, TURNS_SYSTEM, THOUGHTS, ALL_TOOLS)
CASES: dict[str, tuple[Case, ...]] = {
    "plain": (PLAIN, PLAIN.under(enable_thinking=False)),
    "system": (SYSTEM, TURNS_SYSTEM),
    "multi-turn": (HISTORY, TURNS, THOUGHTS, THOUGHTS.under(enable_thinking=False)),
    "tools": (ONE_TOOL, ALL_TOOLS, TWO_CALLS, THOUGHT_CALL, NO_TOOLS, OPENAI, ALL_TOOLS.under(enable_thinking=False)),
    "mask_history": tuple(
        case.under(mask_history=True, **thinks) for case in _LONG for thinks in ({}, {"enable_thinking": False})
    ),
    "train_on_prompt": tuple(case.under(train_on_prompt=True) for case in _LONG),
    "truncation": tuple(
        case.under(cutoff_len=cutoff, **more)
        for case in _LONG
        for cutoff in (3, 11, 16, 24, 37, 61)
        for more in ({}, {"mask_history": True})
    ),
}


def tokenizer() -> Any:
    """Bytes and a few hundred merges that pay no heed to words: text that is cut elsewhere has other tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [tuple(line.split(" ")) for line in MERGES.read_text(encoding="utf-8").splitlines()]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *dict.fromkeys(a + b for a, b in merges)]
    special = SPECIAL.split(" ")
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


@cache
def info_of(entry: str) -> DatasetInfo:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "dataset_info.json").write_text(json.dumps({entry: ENTRIES[entry]}))
        return read_dataset_infos([entry], Path(folder))[0]


def ours(fmt: str | Format, case: Case, made: Any) -> tuple[list[int], list[int]]:
    """input_ids and labels of a case by dataflex, with the tokenizer ``made``."""
    given = find_format(fmt) if isinstance(fmt, str) else fmt
    quiet = bool(given.thought) and not case.thinks
    template = BuiltInTemplate(fmt if isinstance(fmt, str) else "variant", given, made, quiet)
    settings = {key: value for key, value in case.settings.items() if key != "enable_thinking"}
    turns = Converter(info_of(case.entry), "sft")(case.row, "x:1")
    assert not turns.problem, turns.problem
    row = [{"role": role, "content": content} for role, content in turns.turns]
    out = Encoder(made, template, Settings("sft", **{"cutoff_len": 4096, **settings})).batch(
        {"turns": [row], "where": ["x:1"], "weight": [1.0], "kept": [""]}
    )
    return out["input_ids"][0], out["labels"][0]


def numbered() -> Sequence[tuple[str, Case]]:
    """Every case by a name: its column and its place there."""
    return [(f"{column} {i}", case) for column, cases in CASES.items() for i, case in enumerate(cases)]
