"""The tokenizer's own chat template, as `Template` wants it: what stands before each answer, and the answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from dataflex.data.encoding.formats import default_tools
from dataflex.data.encoding.rounds import Conversation, Pair, Pieces, as_messages, calls_of, rounds_of
from dataflex.data.encoding.tools import called, described
from dataflex.data.sources.convert import Turn
from dataflex.utils.errors import UserError, brief
from dataflex.utils.logging import logger

Messages = list[dict[str, Any]]


class ChatTemplate:
    """The tokenizer's own chat template (Jinja).

    One that knows no tools gets them as LLaMA-Factory writes them there: in the tool format `default`.
    """

    after: Pieces = ()
    ends_with_eos = False

    def __init__(self, tokenizer: Any, thinks: bool = True, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._options: dict[str, Any] = {} if thinks else {"enable_thinking": False}
        self._tokens = tuple(sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}))
        self._system = system
        source = repr(tokenizer.chat_template)
        self._knows = {word: word in source for word in ("tools", "tool_calls")}
        source += "" if thinks else repr(self._options)
        source += "" if system is None else f":{system}"
        source += "" if all(self._knows.values()) else repr(default_tools())
        self.identity = f"chat:{hashlib.sha256(source.encode()).hexdigest()}"
        self.end_of_turn = self._find_end_of_turn()

    def _find_end_of_turn(self) -> str:
        try:
            _, (answer,) = self.pairs([("user", "a"), ("assistant", "b")], "")[0]
        except UserError:
            return ""
        ends = [token for token in self._tokens if answer.endswith(token)]
        return max(ends, key=len, default="")

    def pairs(self, turns: Sequence[Turn], where: str, last_only: bool = False) -> list[Pair]:
        """See `Template`. The rendering up to each assistant turn must be the beginning of the next one.

        With ``last_only`` a template that renders earlier answers differently (it drops their thoughts) is
        fine: everything before the last answer is then one prompt.
        """
        conversation = self._conversation(turns, where)
        options = {**self._options, **({"tools": conversation.tools} if conversation.tools else {})}
        messages, *rounds = as_messages(conversation, where)
        done = ""
        pairs: list[tuple[str, str]] = []
        for number, added in enumerate(rounds, start=1):
            is_last = number == len(rounds)
            messages = [*messages, *added]
            prompt = self._render(messages[:-1], True, options, where)
            whole = self._render(messages, False, options, where)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                if last_only and not is_last:
                    continue
                if last_only and whole.startswith(prompt):
                    done, pairs = "", []
                else:
                    raise UserError(
                        f"{where}: the tokenizer's chat template renders earlier turns differently from turn "
                        f"{len(messages)} on, so the answers cannot be masked; use a named template or mask_history"
                    )
            answer = self._cut_after_end(whole[len(prompt) :])
            if not answer:
                raise UserError(f"{where}: the tokenizer's chat template renders nothing for turn {len(messages)}")
            pairs.append((prompt[len(done) :], answer))
            done = prompt + answer
        return [((prompt,), (answer,)) for prompt, answer in pairs]

    def _conversation(self, turns: Sequence[Turn], where: str) -> Conversation:
        """With the system prompt that conversations get, and as text what the chat template has no place for."""
        made = rounds_of(turns)
        if made.system is None:
            made = replace(made, system=self._system)
        if made.tools and not self._knows["tools"]:
            _say_spelled()
            made = replace(made, system=(made.system or "") + described(default_tools(), made.tools, where), tools=[])
        if not self._knows["tool_calls"] and any(r.calls for r in made.rounds):
            _say_spelled()
            rounds = [replace(r, answer=_spelled(r.answer, where), calls=False) if r.calls else r for r in made.rounds]
            made = replace(made, rounds=rounds)
        return made

    def _render(self, messages: Messages, opens_answer: bool, options: dict[str, Any], where: str) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=opens_answer, **options
            )
        except Exception as error:  # a template is a program
            raise UserError(
                f"{where}: the tokenizer's chat template refuses this conversation: {brief(error)}"
            ) from error
        assert isinstance(text, str)
        return text

    def _cut_after_end(self, answer: str) -> str:
        """``answer`` without the white space that follows its end-of-turn token."""
        cut = answer.rstrip()
        return cut if cut.endswith(self._tokens) else answer


def _spelled(answer: str, where: str) -> str:
    around, calls = calls_of(answer, where)
    return around + called(default_tools(), calls, where)


@cache
def _say_spelled() -> None:
    """Once in a process, although a template is made for each kind of a run's data."""
    logger.warning(
        "template: the tokenizer's chat template has no place for tools or their calls, so they are trained as the "
        "tool format 'default' writes them; the chat template that is saved does not do that: where the model is to be "
        "used with it, give a template that knows tools"
    )
