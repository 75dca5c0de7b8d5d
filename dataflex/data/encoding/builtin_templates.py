"""The conversation formats that go by a name, as plain strings.

`{content}` is the turn's text, `{bos}` and `{eos}` are the tokenizer's own tokens. The formats are those
that the models were published with, in the spelling that LLaMA-Factory trains them with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from string import Template

NO_THOUGHT = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Format:
    """One conversation format.

    ``prefix`` opens the conversation; ``user`` ends with ``opens``, what opens the answer; ``answer`` ends with the
    end-of-turn token, the last thing that is trained; ``after`` stands between an answer and the next
    turn. ``tool`` (a tool's result) is ``user`` where it is None. With ``system_in_user`` the system text
    stands inside the first user turn; with ``thinks`` an answer without a thought gets an empty one. Of
    `without_thoughts`, ``quiet``, thoughts are dropped, and the empty one opens the answer, untrained.
    """

    user: str
    opens: str = ""
    answer: str = "{content}{eos}"
    after: str = ""
    prefix: str = ""
    system: str = "{content}"
    tool: str | None = None
    default_system: str = ""
    system_in_user: bool = False
    thinks: bool = False
    quiet: bool = False
    special_tokens: tuple[str, ...] = ()


def without_thoughts(fmt: Format) -> Format:
    """``fmt`` for a model that does not think: nothing changes where it knows no thoughts."""
    if not fmt.thinks:
        return fmt
    tool = None if fmt.tool is None else fmt.tool + NO_THOUGHT
    opens = fmt.opens + NO_THOUGHT
    return replace(fmt, user=fmt.user + NO_THOUGHT, tool=tool, opens=opens, thinks=False, quiet=True)


_CHATML = Format(
    user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
    opens="<|im_start|>assistant\n",
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
        opens="<|start_header_id|>assistant<|end_header_id|>\n\n",
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
        opens="<start_of_turn>model\n",
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
        opens="<|assistant|>\n",
        answer="{content}<|end|>",
        after="\n",
        system="<|system|>\n{content}<|end|>\n",
        special_tokens=("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    ),
    "deepseek": Format(
        prefix="{bos}", user="User: {content}\n\nAssistant:", opens="Assistant:", system="{content}\n\n"
    ),
    "alpaca": Format(
        user="### Instruction:\n{content}\n\n### Response:\n",
        opens="### Response:\n",
        after="\n\n",
        system="{content}\n\n",
        default_system=(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        ),
    ),
    "default": Format(
        user="Human: {content}{eos}\nAssistant:",
        opens="Assistant:",
        after="\n",
        system="System: {content}{eos}\n",
    ),
    "empty": Format(user="{content}", answer="{content}"),
}

_JINJA = """\
{%- if messages[0]['role'] == 'system' -%}
  {%- set system, turns = messages[0]['content'], messages[1:] -%}
{%- else -%}
  {%- set system, turns = $default_system, messages -%}
{%- endif -%}
{%- set system = $system_before + system + $system_after if system else '' -%}
{{- $prefix -}}
{%- for message in turns -%}
  {%- if message['role'] == 'assistant' -%}
    {{- $opening + $answer_before -}}$answer{{- $answer_after -}}
  {%- elif message['role'] in ('user', 'tool') -%}
    {{- $first if loop.first else $after -}}
    {%- if message['role'] == 'tool' -%}
      {{- $tool_before -}}$inside{{- message['content'] + $tool_after -}}
    {%- else -%}
      {{- $user_before -}}$inside{{- message['content'] + $user_after -}}
    {%- endif -%}
  {%- else -%}
    {{- raise_exception('no turn of ' + message['role'] + ' here') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- $opens -}}{%- endif -%}
"""
_ANSWER = "{{- message['content'] -}}"
_THOUGHT = """
    {%- if not ('<think>' in message['content'] or '</think>' in message['content']) -%}{{- $no_thought -}}{%- endif -%}
    {{- message['content'] -}}"""
_STRIP = """
      {%- set kept = namespace(text='') -%}
      {%- for part in message['content'].split('<think>') -%}
        {%- set cut = part.split('</think>', 1) -%}
        {%- set kept.text = kept.text + (part if loop.first else cut[1] if cut|length > 1 else '<think>' + part) -%}
      {%- endfor -%}
      {{- kept.text.lstrip('\\n') -}}"""
_FORGET = f"""
    {{%- if loop.last -%}}$thought
    {{%- else -%}}{_STRIP}
    {{%- endif -%}}"""


def as_jinja(fmt: Format, *, forgets: bool) -> str:
    """``fmt`` (its tokens filled in) as a chat template that renders what is trained, character for character.

    forgets: leave the thoughts of earlier answers out, as is done where only the last answer is trained.
    """
    texts = {"default_system": fmt.default_system, "no_thought": NO_THOUGHT, "opens": fmt.opens}
    texts |= {"prefix": fmt.prefix, "after": fmt.after}
    parts = {"system": fmt.system, "user": fmt.user, "tool": fmt.tool or fmt.user, "answer": fmt.answer}
    for part, text in parts.items():
        before, _, after = text.partition("{content}")
        texts |= {f"{part}_before": before, f"{part}_after": after}
    for part in ("user_after", "tool_after"):
        assert texts[part].endswith(fmt.opens)
        texts[part] = texts[part].removesuffix(fmt.opens)
    written = {name: json.dumps(text, ensure_ascii=False) for name, text in texts.items()}
    thought = Template(_THOUGHT).substitute(written)
    opening = written["opens"]
    if fmt.quiet and forgets:
        opening = f"({opening} if loop.last else {json.dumps(fmt.opens.removesuffix(NO_THOUGHT))})"
    answer = _STRIP if fmt.quiet else _ANSWER
    if fmt.thinks:
        answer = Template(_FORGET).substitute(thought=thought) if forgets else thought
    return Template(_JINJA).substitute(
        written,
        answer=answer,
        opening=opening,
        first="''" if fmt.system_in_user else "system",
        inside="{{- system if loop.first else '' -}}" if fmt.system_in_user else "",
    )
