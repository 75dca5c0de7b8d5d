"""The conversation formats that go by a name, as plain strings.

`{content}` is the turn's text, `{bos}` and `{eos}` are the tokenizer's own tokens. The formats are those
that the models were published with, in the spelling that LLaMA-Factory trains them with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

NO_THOUGHT = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Format:
    """One conversation format.

    ``prefix`` opens the conversation; ``user`` ends with what opens the answer; ``answer`` ends with the
    end-of-turn token, the last thing that is trained; ``after`` stands between an answer and the next
    turn. ``tool`` (a tool's result) is ``user`` where it is None. With ``system_in_user`` the system text
    stands inside the first user turn; with ``thinks`` an answer without a thought gets an empty one.
    """

    user: str
    answer: str = "{content}{eos}"
    after: str = ""
    prefix: str = ""
    system: str = "{content}"
    tool: str | None = None
    default_system: str = ""
    system_in_user: bool = False
    thinks: bool = False
    special_tokens: tuple[str, ...] = ()


_CHATML = Format(
    user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
    answer="{content}<|im_end|>",
    after="\n",
    system="<|im_start|>system\n{content}<|im_end|>\n",
    tool=("<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"),
    special_tokens=("<|im_start|>", "<|im_end|>"),
)

FORMATS: dict[str, Format] = {
    "llama2": Format(
        user="{bos}[INST] {content} [/INST]",
        system="<<SYS>>\n{content}\n<</SYS>>\n\n",
        system_in_user=True,
    ),
    "llama3": Format(
        prefix="{bos}",
        system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        user=(
            "<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        tool=(
            "<|start_header_id|>ipython<|end_header_id|>\n\n{content}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        answer="{content}<|eot_id|>",
        special_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "qwen": replace(_CHATML, default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": replace(_CHATML, thinks=True, special_tokens=(*_CHATML.special_tokens, "<think>", "</think>")),
    "qwen3_nothink": _CHATML,
    "gemma": Format(
        prefix="{bos}",
        user="<start_of_turn>user\n{content}<end_of_turn>\n<start_of_turn>model\n",
        tool="<start_of_turn>tool\n{content}<end_of_turn>\n<start_of_turn>model\n",
        answer="{content}<end_of_turn>",
        after="\n",
        system="{content}\n\n",
        system_in_user=True,
        special_tokens=("<start_of_turn>", "<end_of_turn>"),
    ),
    "mistral": Format(
        prefix="{bos}",
        user="[INST] {content}[/INST]",
        answer=" {content}{eos}",
        system="{content}\n\n",
        system_in_user=True,
    ),
    "phi": Format(
        user="<|user|>\n{content}<|end|>\n<|assistant|>\n",
        answer="{content}<|end|>",
        after="\n",
        system="<|system|>\n{content}<|end|>\n",
        special_tokens=("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    ),
    "deepseek": Format(prefix="{bos}", user="User: {content}\n\nAssistant:", system="{content}\n\n"),
    "alpaca": Format(
        user="### Instruction:\n{content}\n\n### Response:\n",
        after="\n\n",
        system="{content}\n\n",
        default_system=(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        ),
    ),
    "default": Format(
        user="Human: {content}{eos}\nAssistant:",
        after="\n",
        system="System: {content}{eos}\n",
    ),
    "empty": Format(user="{content}", answer="{content}"),
}
