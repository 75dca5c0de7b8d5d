"""A format as a chat template in Jinja, saved with a trained tokenizer so that it is used as it was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from string import Template

from dataflex.data.encoding.formats import Format
from dataflex.data.encoding.tools import macros

_JINJA = """\
$macros
{%- if messages[0]['role'] == 'system' -%}
  {%- set system, turns = messages[0]['content'], messages[1:] -%}
{%- else -%}
  {%- set system, turns = $default_system, messages -%}
{%- endif -%}
{%- set system = system + (described(tools) if tools else '') -%}
{%- set system = $system_before + system + $system_after if system else '' -%}
{{- $prefix -}}
{%- for message in turns -%}
  {%- if message['role'] == 'assistant' -%}
    {%- set calls = namespace(all=[]) -%}
    {%- for call in message['tool_calls'] or [] -%}
      {%- set calls.all = calls.all + [call['function'] or call] -%}
    {%- endfor -%}
    {%- set content = message['content'] or '' -%}
    {{- $opening + ($call_before if calls.all else $answer_before) -}}$answer
    {{- called(calls.all) + $call_after if calls.all else $answer_after -}}
    {{- $end if loop.last else '' -}}
  {%- elif message['role'] in ('user', 'tool') -%}
    {%- set results = message['role'] == 'tool' -%}
    {%- if results and loop.previtem is defined and loop.previtem['role'] == 'tool' -%}
      {{- $between -}}
    {%- else -%}
      {{- ($first if loop.first else $after) + ($tool_before if results else $user_before) -}}$inside
    {%- endif -%}
    {{- message['content'] -}}
    {%- if not (results and loop.nextitem is defined and loop.nextitem['role'] == 'tool') -%}
      {{- $tool_after if results else $user_after -}}
    {%- endif -%}
  {%- else -%}
    {{- raise_exception('no turn of ' + message['role'] + ' here') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- $opens -}}{%- endif -%}
"""
_ANSWER = "{{- content -}}"
_THOUGHT = """
    {%- if not ($thought_opens in content or $thought_closes in content) -%}{{- $no_thought -}}{%- endif -%}
    {{- content -}}"""
_STRIP = """
      {%- set kept = namespace(text='') -%}
      {%- for part in content.split($thought_opens) -%}
        {%- set cut = part.split($thought_closes, 1) -%}
        {%- set kept.text = kept.text + (
              part if loop.first else cut[1] if cut|length > 1 else $thought_opens + part) -%}
      {%- endfor -%}
      {{- kept.text.lstrip('\\n') -}}"""
_FORGET = f"""
    {{%- if loop.last -%}}{_THOUGHT}
    {{%- else -%}}{_STRIP}
    {{%- endif -%}}"""


def as_jinja(fmt: Format, tokens: Mapping[str, str], *, quiet: bool, forgets: bool) -> str:
    """``fmt`` as a chat template that renders what is trained, character for character.

    tokens: what `{bos}` and `{eos}` are. quiet: without thoughts, an empty one opens the answers. forgets: leave the
    thoughts of earlier answers out, as is done where only the last answer is trained.
    """

    def filled(text: str) -> str:
        for token, spelled in tokens.items():
            text = text.replace(token, spelled)
        return text

    opens = filled(fmt.opens)
    opening = opens + fmt.empty_thought if quiet else opens
    texts = {"default_system": fmt.default_system, "no_thought": fmt.empty_thought, "opens": opening}
    texts |= {"prefix": filled(fmt.prefix), "after": filled(fmt.after), "between": fmt.between_results}
    texts["end"] = tokens["{eos}"] if fmt.ends_with_eos else ""
    parts = {"system": fmt.system, "user": fmt.user, "tool": fmt.tool or fmt.user}
    for part, text in (parts | {"answer": fmt.answer, "call": fmt.call or fmt.answer}).items():
        before, _, after = text.partition("{content}")
        texts |= {f"{part}_before": filled(before), f"{part}_after": filled(after)}
    for part in ("user_after", "tool_after"):
        texts[part] = texts[part].removesuffix(opens)
    if fmt.thought:
        texts |= dict(zip(("thought_opens", "thought_closes"), (word.strip() for word in fmt.thought), strict=True))
    written = {name: json.dumps(text, ensure_ascii=False) for name, text in texts.items()}
    written["opening"] = written["opens"]
    if quiet and forgets:
        written["opening"] = f"({written['opens']} if loop.last else {json.dumps(opens, ensure_ascii=False)})"
    answer = _ANSWER
    if fmt.thought:
        answer = _STRIP if quiet else _FORGET if forgets else _THOUGHT
    return Template(_JINJA).substitute(
        written,
        macros=macros(fmt.tools),
        answer=Template(answer).substitute(written),
        first="''" if fmt.system_in_user else "system",
        inside="{{- system if loop.first else '' -}}" if fmt.system_in_user else "",
    )
