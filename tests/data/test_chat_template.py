"""The tokenizer's own chat template and tools: given as it wants them, or as text where it has no place for them."""

from __future__ import annotations

import pytest

from dataflex.data.encoding import chat_template
from dataflex.data.encoding.template import get_template
from dataflex.utils.errors import UserError
from tests.data.test_template import CALL, CHATML, TOOLS, TURNS, rendered
from tests.tiny import byte_tokenizer

KNOWING = (
    "{% if tools %}<s>{% for tool in tools %}{{ tool.function.name }};{% endfor %}</s>{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}!{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
CALLED = [("tools", TOOLS), TURNS[0], CALL, ("tool", "4"), ("tool", "5"), TURNS[1]]
ARGUMENTS = '{"x": "<é>", "y": [1, null]}'


def test_a_template_that_knows_tools_gets_them() -> None:
    assert rendered(None, CALLED, byte_tokenizer(KNOWING)) == (
        f"<s>get;</s><s>user\na</s>\n<s>assistant\n⟦!get{ARGUMENTS}</s>⟧\n<s>tool\n4</s>\n<s>tool\n5</s>\n"
        "<s>assistant\n⟦b</s>⟧"
    )


def test_a_template_that_knows_none_gets_text() -> None:
    text = rendered(None, CALLED, byte_tokenizer(CHATML))
    assert text.startswith(
        "<s>system\nYou have access to the following tools:\n> Tool Name: get\nTool Description: ä\n"
    )
    assert text.endswith(
        f"</s>\n<s>user\na</s>\n<s>assistant\n⟦Action: get\nAction Input: {ARGUMENTS}</s>⟧\n"
        "<s>tool\n4</s>\n<s>tool\n5</s>\n<s>assistant\n⟦b</s>⟧"
    )
    with_system = rendered(None, [("system", "s"), *CALLED], byte_tokenizer(CHATML))
    assert with_system.startswith("<s>system\nsYou have access to")


@pytest.mark.parametrize(("chat", "turns", "times"), [(CHATML, CALLED, 1), (KNOWING, CALLED, 0), (CHATML, TURNS, 0)])
def test_what_the_saved_template_will_not_render_is_said_once(
    monkeypatch: pytest.MonkeyPatch, chat: str, turns: list[tuple[str, str]], times: int
) -> None:
    said: list[str] = []
    monkeypatch.setattr(chat_template.logger, "warning", said.append)
    chat_template._say_spelled.cache_clear()
    for _ in range(2):
        rendered(None, turns, byte_tokenizer(chat))
    assert len(said) == times and all("has no place for tools or their calls" in text for text in said)


def test_identity_and_refusal() -> None:
    assert get_template(None, byte_tokenizer(KNOWING)).identity != get_template(None, byte_tokenizer(CHATML)).identity
    strict = "{{ raise_exception('no tools here') if tools }}" + KNOWING
    with pytest.raises(UserError, match="x:1: the tokenizer's chat template refuses this conversation: no tools here"):
        rendered(None, CALLED, byte_tokenizer(strict))
