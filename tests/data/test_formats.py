"""Templates of a user's file: what they are made from, and every mistake in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dataflex.data.encoding.formats import Format, find_format, packaged_formats
from dataflex.data.encoding.template import get_template
from dataflex.utils.errors import UserError
from tests.data.test_template import SYSTEM, TURNS, rendered
from tests.tiny import byte_tokenizer

Find = Callable[[str], Format]


@pytest.fixture
def find(tmp_path: Path) -> Find:
    """find(text of a file): its template `mine`."""

    def find(text: str) -> Format:
        (tmp_path / "own.yaml").write_text(text)
        return find_format(f"{tmp_path}/own.yaml#mine")

    return find


def test_a_template_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        'templates:\n  mine:\n    prefix: "{bos}"\n    user: "Q: {content}{eos}A:"\n    opens: "A:"\n    after: "|"\n'
    )
    name = f"{tmp_path}/own.yaml#mine"
    assert rendered(name, SYSTEM + TURNS) == "<s>sQ: a</s>A:⟦b</s>⟧|Q: c</s>A:⟦d</s>⟧"
    assert get_template(name, byte_tokenizer()).end_of_turn == "</s>"


def test_like_takes_what_is_not_said_from_another(find: Find) -> None:
    qwen = packaged_formats()["qwen"]
    assert find("templates: {mine: {like: qwen}}") == qwen
    assert find("templates: {mine: {like: qwen, default_system: x}}") == replace(qwen, default_system="x")
    chain = "templates: {mine: {like: b, answer: '{content}!'}, b: {like: qwen, default_system: x}}"
    assert find(chain) == replace(qwen, default_system="x", answer="{content}!")
    assert find("templates: {qwen: {like: qwen, after: '|'}, mine: {like: qwen}}") == replace(qwen, after="|")


def test_tool_formats_of_the_file_come_first(find: Find) -> None:
    text = "templates: {mine: {like: qwen}}\ntool_formats: {qwen: {described: 'D{{ tools|length }}', called: C}}"
    assert find(text).tools.described == "D{{ tools|length }}"
    assert find("templates: {mine: {like: qwen, tools: llama3}}").tools == packaged_formats()["llama3"].tools


TOOL_TURNS = [
    ("tools", '[{"type": "function", "function": {"name": "f"}}]'),
    ("user", "a"),
    ("function", '{"name": "f", "arguments": {"x": "ü"}}'),
]


def test_jinja_of_a_file_writes_its_tools(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "templates: {mine: {user: '{content}>', answer: '{content}{eos}', call: '!{content}{eos}', tools: t}}\n"
        "tool_formats: {t: {described: '{{ tools[0].function.name }}:', called: '{{ calls[0].arguments|tojson }}'}}"
    )
    assert rendered(f"{tmp_path}/own.yaml#mine", TOOL_TURNS) == 'f:a>⟦!{"x": "ü"}</s>⟧'


@pytest.mark.parametrize(
    ("called", "text"),
    [
        ("{{ calls[0", "template: its tool format is not valid Jinja: "),
        ("{{ raise_exception('no') }}", "x:1: the template's tool format cannot write the calls of tools: no"),
        ("{{ calls.__class__.mro() }}", "x:1: the template's tool format cannot write the calls of tools: "),
        ("{{ calls[0].args.x }}", "x:1: the template's tool format cannot write the calls of tools: "),
    ],
)
def test_jinja_that_fails(tmp_path: Path, called: str, text: str) -> None:
    (tmp_path / "own.yaml").write_text(
        f"templates: {{mine: {{user: '{{content}}', tools: t}}}}\ntool_formats:\n  t:\n    described: ''\n"
        f'    called: "{called}"\n'
    )
    with pytest.raises(UserError) as error:
        rendered(f"{tmp_path}/own.yaml#mine", TOOL_TURNS)
    assert str(error.value).startswith(text) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "templates: {mine: {usr: x}}",
            "own.yaml:templates.mine: unknown key 'usr' (did you mean 'user'?); valid: like, ",
        ),
        ("templates: {mine: {after: x}}", "own.yaml:templates.mine: needs user, the text around a question, or like"),
        ("templates: {mine: {user: 3}}", "templates.mine.user: expected text, got 3"),
        ("templates: {mine: {user: x}}", "templates.mine.user: expected {content} once, got it 0 times"),
        ("templates: {mine: {user: '{contents}'}}", "mine.user: '{contents}' is not known (did you mean 'content'?)"),
        ("templates: {mine: {user: '{content}', prefix: '{content}'}}", "mine.prefix: prefix takes no {content}"),
        ("templates: {mine: {user: '{content}A', opens: B}}", "mine.user: expected to end with opens, 'B'"),
        (
            "templates: {mine: {user: '{content}A', opens: A, tool: '{content}'}}",
            "mine.tool: expected to end with opens, ",
        ),
        ("templates: {mine: {user: '{content}{content}'}}", "mine.user: expected {content} once, got it 2 times"),
        ("templates: {mine: {user: '{content}', thought: [a]}}", "mine.thought: expected two texts: what opens"),
        (
            "templates: {mine: {user: '{content}', special_tokens: x}}",
            "special_tokens: expected a list of texts, got 'x'",
        ),
        (
            "templates: {mine: {user: '{content}', system_in_user: x}}",
            "system_in_user: expected true or false, got 'x'",
        ),
        ("templates: {mine: {like: qwem}}", "mine.like: there is no template 'qwem' (did you mean 'qwen'?)"),
        ("templates: {mine: {like: b}, b: {like: mine}}", "templates.b.like: 'mine' is like it in turn"),
        ("templates: {mine: {like: mine}}", "templates.mine.like: there is no template 'mine'"),
        ("templates: {mine: 3}", "own.yaml:templates.mine: expected a mapping, got 3"),
        (
            "templates: {mine: {like: qwen, tools: qwn}}",
            "mine.tools: there is no tool format 'qwn' (did you mean 'qwen'?)",
        ),
        (
            "templates: {mine: {like: qwen, tools: t}}\ntool_formats: {t: {called: x}}",
            "own.yaml:tool_formats.t: expected",
        ),
        ("templates: {min: {like: qwen}}", "own.yaml has no template 'mine' (did you mean 'min'?); it has min"),
        ("template: {mine: {like: qwen}}", "own.yaml:template: unknown key (did you mean 'templates'?)"),
        ("templates: [mine]", "own.yaml:templates: expected a mapping of names, got list"),
        ("", "own.yaml: the file of templates is empty"),
    ],
)
def test_mistakes_of_a_file(find: Find, text: str, error: str) -> None:
    with pytest.raises(UserError) as caught:
        find(text)
    assert error in str(caught.value) and "\n" not in str(caught.value)


def test_names_that_are_no_template(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"template: 'qwen_3' is not known \(did you mean 'qwen3'\?\); valid: alpaca, "):
        find_format("qwen_3")
    with pytest.raises(UserError, match=r"'own.yaml' is not known \(one of a file is file.yaml#name\)"):
        find_format("own.yaml")
    with pytest.raises(UserError, match=r"own.yaml: the file of templates does not exist"):
        find_format(f"{tmp_path}/own.yaml#mine")


def test_a_name_may_have_hyphens_as_models_have() -> None:
    assert find_format("gpt-oss") is find_format("gpt_oss")
    assert find_format("qwen3-5-nothink") is find_format("qwen3_5_nothink")
