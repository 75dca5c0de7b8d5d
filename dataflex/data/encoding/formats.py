"""Formats of conversations as data: those of ``configs/templates/formats.yaml``, and a user's file of the same form.

`template: qwen` is one of the former, `template: my_templates.yaml#name` one of the latter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from dataflex.config.paths import packaged
from dataflex.config.sections.fields import shown
from dataflex.config.yaml_reader import read_mapping
from dataflex.utils.errors import UserError, cut, listed, nearest

PACKAGED = "configs/templates/formats.yaml"
GROUPS = ("templates", "tool_formats")
WITH_CONTENT = ("user", "answer", "system", "tool", "call")
_TOKENS = ("bos", "eos")


@dataclass(frozen=True)
class ToolFormat:
    """Jinja texts: how ``tools`` are described in the system text, and how ``calls`` of them are written."""

    described: str
    called: str


@dataclass(frozen=True)
class Format:
    """One format. `{content}` is the turn's text, `{bos}` and `{eos}` are the tokenizer's own tokens.

    ``prefix`` opens the conversation; ``user`` ends with ``opens``, what opens the answer; ``answer`` is what is
    trained, its end-of-turn token included; ``after`` stands between an answer and the next turn, and is not trained.
    ``call`` is an answer that calls tools (``answer`` where it is empty); ``tool`` holds their results (``user`` where
    it is empty), with ``between_results`` between two. ``tools``: how tools are described and called. With
    ``system_in_user`` the system text stands inside the first user turn. ``thought``: what opens and closes a thought;
    an answer without one gets an empty one. With ``ends_with_eos`` the eos token stands after the last answer alone,
    and is what is predicted at the end of the others.
    """

    user: str
    tools: ToolFormat
    opens: str = ""
    answer: str = "{content}{eos}"
    after: str = ""
    prefix: str = ""
    system: str = "{content}"
    tool: str = ""
    call: str = ""
    between_results: str = "\n"
    default_system: str = ""
    system_in_user: bool = False
    thought: tuple[str, ...] = ()
    ends_with_eos: bool = False
    special_tokens: tuple[str, ...] = ()

    @property
    def empty_thought(self) -> str:
        return "".join(self.thought)


KEYS = ("like", *(f.name for f in fields(Format)))


@dataclass(frozen=True)
class _File:
    """The entries of a file as they stand in it."""

    path: Path
    templates: Mapping[str, Any]
    tool_formats: Mapping[str, Any]


@cache
def packaged_formats() -> dict[str, Format]:
    """The formats that go by a name alone."""
    file = _packaged_file()
    return {name: _format(name, file) for name in file.templates}


@cache
def _packaged_file() -> _File:
    return _read(packaged(PACKAGED))


def find_format(name: str) -> Format:
    """The format of `template: name`. UserError, with the nearest match, where there is none or it is not right.

    Hyphens mean underscores: models go by names such as gpt-oss.
    """
    path, hash_sign, inside = name.rpartition("#")
    known = packaged_formats()
    if hash_sign:
        file = _read(Path(path).expanduser())
        if inside not in file.templates:
            hint = f"{nearest(inside, file.templates)}; it has {listed(file.templates) or 'none'}"
            raise UserError(f"template: {path} has no template '{cut(inside)}'{hint}")
        return _format(inside, file)
    name = name.replace("-", "_")
    if name not in known:
        hint = " (one of a file is file.yaml#name)" if name.endswith((".yaml", ".yml")) else nearest(name, known)
        raise UserError(
            f"template: '{cut(name)}' is not known{hint}; valid: {', '.join(sorted(known))}, "
            "or none for the tokenizer's chat template"
        )
    return known[name]


def default_tools() -> ToolFormat:
    """How tools are written where a format says nothing of it."""
    return packaged_formats()["default"].tools


def _read(path: Path) -> _File:
    content = read_mapping(path, "file of templates")
    for key, entries in content.items():
        if key not in GROUPS:
            raise UserError(f"{path}:{cut(key)}: unknown key{nearest(key, GROUPS)}; valid: {', '.join(GROUPS)}")
        if not isinstance(entries, dict):
            raise UserError(f"{path}:{key}: expected a mapping of names, got {shown(entries)}")
    return _File(path, content.get("templates", {}), content.get("tool_formats", {}))


def _format(name: str, file: _File) -> Format:
    values = _values(name, file, ())
    where = f"{file.path}:templates.{cut(name)}"
    values["tools"] = _tools(values.get("tools", "default"), file, f"{where}.tools")
    if "user" not in values:
        raise UserError(f"{where}: needs user, the text around a question, or like, the name of another template")
    given: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
    made = Format(**given)
    for key in ("user", "tool"):
        if getattr(made, key) and not getattr(made, key).endswith(made.opens):
            raise UserError(f"{where}.{key}: expected to end with opens, {shown(made.opens)}")
    return made


def _values(name: str, file: _File, seen: tuple[str, ...]) -> dict[str, Any]:
    """The keys of an entry over those of what it is like: another entry of the file, else a packaged one."""
    where = f"{file.path}:templates.{cut(name)}"
    entry = file.templates[name]
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a mapping, got {shown(entry)}")
    for key, value in entry.items():
        if key not in KEYS:
            raise UserError(f"{where}: unknown key '{cut(str(key))}'{nearest(str(key), KEYS)}; valid: {listed(KEYS)}")
        problem = _problem(key, value)
        if problem:
            raise UserError(f"{where}.{key}: {problem}")
    own = {key: value for key, value in entry.items() if key != "like"}
    if "like" not in entry:
        return own
    base = entry["like"]
    if base in seen:
        raise UserError(f"{where}.like: '{cut(base)}' is like it in turn")
    if base in file.templates and base != name:
        return _values(base, file, (*seen, name)) | own
    whole = _packaged_file()
    if file is whole or base not in whole.templates:
        known = {**file.templates, **whole.templates}
        raise UserError(f"{where}.like: there is no template '{cut(base)}'{nearest(base, known)}")
    return _values(base, whole, ()) | own


def _problem(key: str, value: Any) -> str:
    """What is wrong with the value of a key, or ''."""
    if key in ("system_in_user", "ends_with_eos"):
        return "" if isinstance(value, bool) else f"expected true or false, got {shown(value)}"
    if key in ("thought", "special_tokens"):
        if not (isinstance(value, list) and all(isinstance(text, str) and text for text in value)):
            return f"expected a list of texts, got {shown(value)}"
        return "" if key != "thought" or len(value) == 2 else "expected two texts: what opens a thought, what closes it"
    if not isinstance(value, str):
        return f"expected text, got {shown(value)}"
    if key in ("like", "tools", "default_system"):
        return ""
    for word in re.findall(r"\{(\w+)\}", value):
        if word not in ("content", *_TOKENS) and nearest(word, ("content", *_TOKENS)):
            return f"'{{{cut(word)}}}' is not known{nearest(word, ('content', *_TOKENS))}"
    if key in WITH_CONTENT and value.count("{content}") != 1:
        return f"expected {{content}} once, got it {value.count('{content}')} times"
    return f"{key} takes no {{content}}" if key not in WITH_CONTENT and "{content}" in value else ""


def _tools(name: str, file: _File, where: str) -> ToolFormat:
    """The tool format of a name: of the file, else a packaged one."""
    known = {**_packaged_file().tool_formats, **file.tool_formats}
    if name not in known:
        raise UserError(f"{where}: there is no tool format '{cut(name)}'{nearest(name, known)}; valid: {listed(known)}")
    entry, keys = known[name], tuple(f.name for f in fields(ToolFormat))
    if not (isinstance(entry, dict) and set(entry) == set(keys) and all(isinstance(t, str) for t in entry.values())):
        place = f"{file.path}:tool_formats.{cut(name)}"
        raise UserError(f"{place}: expected the texts {' and '.join(keys)}, got {listed(entry or ['nothing'])}")
    return ToolFormat(**entry)
