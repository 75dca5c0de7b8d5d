"""Golden renderings: the exact text of one two-turn conversation, with what is trained in ⟦ ⟧."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2 import TemplateError

from dataflex.data.encoding import template as template_module
from dataflex.data.encoding.encode import IGNORE_INDEX, tokenizer_identity
from dataflex.data.encoding.formats import packaged_formats
from dataflex.data.encoding.rounds import as_messages, rounds_of
from dataflex.data.encoding.template import BuiltInTemplate, get_template
from dataflex.data.encoding.tokenize import Encoder, Settings
from dataflex.data.pool import mark_trained
from dataflex.utils.errors import UserError
from tests.tiny import byte_tokenizer

FORMATS = packaged_formats()
TURNS = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
SYSTEM = [("system", "s")]

GOLDEN = {
    "llama2": "<s>[INST] a [/INST]⟦b</s>⟧<s>[INST] c [/INST]⟦d</s>⟧",
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦b<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦d<|eot_id|>⟧"
    ),
    "qwen": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧"
    ),
    "qwen3": (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nb<|im_end|>⟧\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nd<|im_end|>⟧"
    ),
    "qwen3_nothink": (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧"
    ),
    "gemma": (
        "<s><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n⟦b<end_of_turn>⟧\n"
        "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n⟦d<end_of_turn>⟧"
    ),
    "mistral": "<s>[INST] a[/INST]⟦ b</s>⟧[INST] c[/INST]⟦ d</s>⟧",
    "phi": "<|user|>\na<|end|>\n<|assistant|>\n⟦b<|end|>⟧\n<|user|>\nc<|end|>\n<|assistant|>\n⟦d<|end|>⟧",
    "deepseek": "<s>User: a\n\nAssistant:⟦b</s>⟧User: c\n\nAssistant:⟦d</s>⟧",
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\na\n\n### Response:\n⟦b</s>⟧\n\n"
        "### Instruction:\nc\n\n### Response:\n⟦d</s>⟧"
    ),
    "default": "Human: a</s>\nAssistant:⟦b</s>⟧\nHuman: c</s>\nAssistant:⟦d</s>⟧",
    "empty": "a⟦b⟧c⟦d⟧",
}

WITH_SYSTEM = {
    "llama2": "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|><|start_header_id|>user",
    "qwen": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na",
    "qwen3": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na",
    "qwen3_nothink": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na",
    "gemma": "<s><start_of_turn>user\ns\n\na<end_of_turn>\n",
    "mistral": "<s>[INST] s\n\na[/INST]",
    "phi": "<|system|>\ns<|end|>\n<|user|>\na",
    "deepseek": "<s>s\n\nUser: a",
    "alpaca": "s\n\n### Instruction:\na",
    "default": "System: s</s>\nHuman: a</s>",
    "empty": "sa",
}


def rendered(
    name: str | None, turns: list[tuple[str, str]], tokenizer: Any = None, thinks: bool = True, **settings: Any
) -> str:
    tokenizer = tokenizer or byte_tokenizer()
    encoder = Encoder(tokenizer, get_template(name, tokenizer, thinks), Settings("sft", 4096, **settings))
    row = [{"role": role, "content": content} for role, content in turns]
    out = encoder.batch({"turns": [row], "where": ["x:1"], "weight": [1.0], "kept": [""]})
    assert len(out["input_ids"][0]) == len(out["labels"][0]) == out["length"][0]
    return mark_trained(out["input_ids"][0], out["labels"][0], tokenizer)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    assert rendered(name, TURNS) == GOLDEN[name]
    assert rendered(name, SYSTEM + TURNS).startswith(WITH_SYSTEM[name])


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_masks(name: str) -> None:
    plain = GOLDEN[name].replace("⟦", "").replace("⟧", "")
    assert rendered(name, TURNS, train_on_prompt=True) == f"⟦{plain}⟧"
    masked = rendered(name, TURNS, mask_history=True)
    assert masked.count("⟦") == 1 and masked.endswith(GOLDEN[name][GOLDEN[name].rindex("⟦") :])


THOUGHTS = [("user", "a"), ("assistant", "<think>\nx\n</think>\n\nb"), *TURNS[2:], *TURNS[2:]]
TOOLS = (
    '[{"type": "function", "function": {"name": "get", "description": "ä", "parameters": {"type": "object", '
    '"properties": {"x": {"type": "string", "enum": ["<", "b"]}, "y": {"type": "array", "items": {"type": "int"}}}, '
    '"required": ["x"]}}}]'
)
CALL = ("function", '{"name": "get", "arguments": {"x": "<é>", "y": [1, null]}}')
CONVERSATIONS = {
    "plain": TURNS[:2],
    "several turns": TURNS,
    "system": SYSTEM + TURNS[:2],
    "system, several turns": SYSTEM + TURNS,
    "no system": [("system", ""), *TURNS],
    "tool": [*TURNS[:2], ("tool", "4"), ("assistant", "b")],
    "tools": [("tools", TOOLS), TURNS[0], CALL, ("tool", "4"), ("tool", "5"), ("assistant", "b")],
    "system, tools": [*SYSTEM, ("tools", TOOLS), TURNS[0], ("function", "so\n" + CALL[1]), ("tool", "4"), *TURNS[1:]],
    "thoughts": THOUGHTS,
    "of the template's own words": [("user", "{content}{eos} \\ 'x' \"y\" {{ z }} ä\n"), ("assistant", " {bos}\n")],
}


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize(
    ("name", "thinks"), [*((name, True) for name in FORMATS), ("qwen3", False), ("gpt_oss", False)]
)
def test_the_saved_chat_template_renders_what_was_trained(name: str, thinks: bool, last_only: bool) -> None:
    """Token for token, by the tokenizer's own rendering: the prompt before each answer, and the whole."""
    tokenizer = byte_tokenizer()
    template = get_template(name, tokenizer, thinks)
    assert isinstance(template, BuiltInTemplate)
    tokenizer.chat_template = template.chat_template(last_only)
    for what, turns in CONVERSATIONS.items():
        conversation = rounds_of(turns)
        messages = [message for part in as_messages(conversation, "") for message in part]
        ids = [
            tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
            for pair in template.pairs(turns, "", last_only)
            for pieces in pair
        ]
        prompt, whole = (
            tokenizer.apply_chat_template(
                m, tools=conversation.tools or None, add_generation_prompt=opens, return_dict=False
            )
            for m, opens in ((messages[:-1], True), (messages, False))
        )
        assert prompt == sum(ids[:-1], []), (what, tokenizer.decode(prompt))
        end = [tokenizer.eos_token_id] if template.ends_with_eos else []
        assert whole == sum(ids, []) + end, (what, tokenizer.decode(whole))


def test_the_saved_chat_template_refuses_other_roles() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = get_template("qwen", tokenizer).chat_template(False)
    with pytest.raises(TemplateError, match="no turn of judge here"):
        tokenizer.apply_chat_template([{"role": "judge", "content": "a"}], tokenize=False)


def test_tool_results_have_their_place() -> None:
    turns = [("user", "a"), ("assistant", "f()"), ("tool", "4"), ("assistant", "b")]
    assert "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n" in rendered("qwen", turns)
    assert "<|start_header_id|>ipython<|end_header_id|>\n\n4<|eot_id|>" in rendered("llama3", turns)
    assert "\nHuman: 4</s>\nAssistant:⟦b</s>⟧" in rendered("default", turns)
    turns.insert(3, ("tool", "5"))
    assert "<tool_response>\n4\n</tool_response>\n<tool_response>\n5\n</tool_response>" in rendered("qwen", turns)
    assert "\nHuman: 4\n5</s>\nAssistant:⟦b</s>⟧" in rendered("default", turns)


def test_calls_are_written_by_the_tool_format() -> None:
    turns = [("user", "a"), ("function", '{"name": "f", "arguments": {"x": "é"}}')]
    assert rendered("qwen", turns).endswith(
        'assistant\n⟦<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call><|im_end|>⟧'
    )
    assert rendered("llama3", turns).endswith('⟦{"name": "f", "parameters": {"x": "é"}}<|eot_id|>⟧')
    assert rendered("default", turns).endswith('Assistant:⟦Action: f\nAction Input: {"x": "é"}</s>⟧')
    assert rendered("mistral", turns).endswith('⟦[TOOL_CALLS] [{"name": "f", "arguments": {"x": "é"}}]</s>⟧')
    thought = [turns[0], ("function", f"<think>\nx\n</think>\n\n{turns[1][1]}")]
    assert rendered("qwen3", thought).endswith(
        '⟦<think>\nx\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call><|im_end|>⟧'
    )
    with pytest.raises(UserError, match="x:1: the template's tool format cannot write the calls of tools: one answer"):
        rendered("glm4", [turns[0], ("function", f"[{turns[1][1]}, {turns[1][1]}]")])


def test_the_eos_token_alone_ends_the_conversation_and_is_predicted_after_each_answer() -> None:
    tokenizer = byte_tokenizer()
    encoder = Encoder(tokenizer, get_template("gemma2", tokenizer), Settings("sft", 4096))
    row = [{"role": role, "content": content} for role, content in TURNS]
    out = encoder.batch({"turns": [row], "where": ["x:1"], "weight": [1.0], "kept": [""]})
    ids, labels = out["input_ids"][0], out["labels"][0]
    text, end = tokenizer.decode(ids), tokenizer.eos_token_id
    assert text.startswith(
        "<s><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n<start_of_turn>"
    )
    assert text.endswith("<start_of_turn>model\nd<end_of_turn>\n</s>") and ids.count(end) == 1
    of_end = [i for i, label in enumerate(labels) if label == end]
    second = len(tokenizer(text.split("<start_of_turn>user\nc")[0], add_special_tokens=False)["input_ids"])
    assert of_end == [second, len(ids) - 1]
    with pytest.raises(UserError, match="train_on_prompt: not with this template"):
        Encoder(tokenizer, get_template("gemma2", tokenizer), Settings("sft", 9, train_on_prompt=True))


def test_thoughts_of_qwen3() -> None:
    turns = [("user", "a"), ("assistant", "<think>\nx\n</think>\n\nb"), *TURNS[2:]]
    assert "⟦<think>\nx\n</think>\n\nb<|im_end|>⟧" in rendered("qwen3", turns)
    assert rendered("qwen3", turns, mask_history=True) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nd<|im_end|>⟧"
    )


def test_without_thinking_the_empty_thought_opens_the_answer_and_is_not_trained() -> None:
    turns = [("user", "a"), ("assistant", "<think>\nx\n</think>\n\nb"), *TURNS[2:]]
    answers = (
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦b<|im_end|>⟧\n",
        "<|im_start|>assistant\n⟦b<|im_end|>⟧\n",
    )
    last = "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦d<|im_end|>⟧"
    assert rendered("qwen3", turns, thinks=False) == f"<|im_start|>user\na<|im_end|>\n{answers[0]}{last}"
    earlier = answers[1].replace("⟦", "").replace("⟧", "")
    assert (
        rendered("qwen3", turns, thinks=False, mask_history=True) == f"<|im_start|>user\na<|im_end|>\n{earlier}{last}"
    )
    assert rendered("qwen", turns, thinks=False) == rendered("qwen", turns)
    tokenizer = byte_tokenizer()
    assert get_template("qwen3", tokenizer, False).identity != get_template("qwen3", tokenizer).identity


def test_without_thinking_the_tokenizers_own_template_is_told() -> None:
    own = CHATML.replace("<s>assistant\n", "<s>assistant\n{% if enable_thinking is false %}(none){% endif %}")
    own = own.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' and enable_thinking is false %}(none){% endif %}{{ m.content }}"
    )
    tokenizer = byte_tokenizer(own)
    assert rendered(None, TURNS[:2], tokenizer, thinks=False).endswith("<s>assistant\n(none)⟦b</s>⟧")
    assert rendered(None, TURNS[:2], tokenizer).endswith("<s>assistant\n⟦b</s>⟧")
    assert get_template(None, tokenizer, False).identity != get_template(None, tokenizer).identity


def test_braces_in_the_data_stay() -> None:
    assert rendered("default", [("user", "{eos}{content}"), ("assistant", "{bos}")]) == (
        "Human: {eos}{content}</s>\nAssistant:⟦{bos}</s>⟧"
    )


CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<s>{{ m.role }}:{% if m.role == 'assistant' and loop.last %}(new){% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
STRICT = "{{ raise_exception('no system here') if messages[0].role == 'system' }}" + CHATML
SILENT = (
    "{% for m in messages if m.role == 'user' %}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}{% endif %}"
)


def test_chat_template() -> None:
    tokenizer = byte_tokenizer(CHATML)
    assert rendered(None, SYSTEM + TURNS, tokenizer) == (
        "<s>system\ns</s>\n<s>user\na</s>\n<s>assistant\n⟦b</s>⟧\n<s>user\nc</s>\n<s>assistant\n⟦d</s>⟧"
    )
    assert get_template(None, tokenizer).end_of_turn == "</s>"


def test_chat_template_equals_what_generation_sees() -> None:
    tokenizer = byte_tokenizer(CHATML)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, tokenize=False
    )
    encoder = Encoder(tokenizer, get_template(None, tokenizer), Settings("sft", 4096))
    row = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    out = encoder.batch({"turns": [row], "where": ["x:1"], "weight": [1.0], "kept": [""]})
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert out["input_ids"][0][: len(prompt_ids)] == prompt_ids
    assert out["labels"][0][: len(prompt_ids)] == [IGNORE_INDEX] * len(prompt_ids)
    assert IGNORE_INDEX not in out["labels"][0][len(prompt_ids) :]


def test_chat_template_that_rewrites_earlier_turns() -> None:
    tokenizer = byte_tokenizer(FORGETFUL)
    assert rendered(None, TURNS[:2], tokenizer) == "<s>user:a</s><s>assistant:⟦(new)b</s>⟧"
    with pytest.raises(UserError, match=r"x:1: .* renders earlier turns differently from turn 4 on"):
        rendered(None, TURNS, tokenizer)
    assert rendered(None, TURNS, tokenizer, mask_history=True) == (
        "<s>user:a</s><s>assistant:b</s><s>user:c</s><s>assistant:⟦(new)d</s>⟧"
    )


def test_chat_template_that_leaves_the_answer_out_is_refused() -> None:
    with pytest.raises(UserError, match="x:1: the tokenizer's chat template renders nothing for turn 2"):
        rendered(None, TURNS, byte_tokenizer(SILENT))


def test_chat_template_that_raises() -> None:
    tokenizer = byte_tokenizer(STRICT)
    assert "⟦b</s>⟧" in rendered(None, TURNS, tokenizer)
    with pytest.raises(UserError, match="x:1: .* refuses this conversation: no system here"):
        rendered(None, SYSTEM + TURNS, tokenizer)


def test_errors_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"template: 'lama3' is not known \(did you mean 'llama3'\?\)"):
        get_template("lama3", byte_tokenizer())
    with pytest.raises(UserError, match="the tokenizer has no chat template of its own; name one of"):
        get_template(None, byte_tokenizer())
    with pytest.raises(UserError, match="'default' ends an answer with the tokenizer's eos token"):
        get_template("default", byte_tokenizer(eos=False))
    template_module._say_missing.cache_clear()
    assert get_template("qwen", byte_tokenizer()).end_of_turn == "<|im_end|>"
    assert "'qwen' uses <|im_start|>, <|im_end|>, which the tokenizer" in capsys.readouterr().err


def test_identities_differ() -> None:
    tokenizers = [byte_tokenizer(CHATML), byte_tokenizer(FORGETFUL)]
    identities = {get_template(name, tokenizers[0]).identity for name in FORMATS}
    identities |= {get_template(None, tokenizer).identity for tokenizer in tokenizers}
    assert len(identities) == len(FORMATS) + 2
    assert tokenizer_identity(tokenizers[0]) == tokenizer_identity(tokenizers[1])
