"""A conversation becomes (prompt, answer) texts, one pair for each assistant turn, in order.

The concatenation of all pairs is the whole conversation. The answer is what is trained: the assistant's
text with its end-of-turn token; what stands between that token and the next turn opens the next prompt.
Special tokens that stand in the data itself are tokenised as such, as the model's own chat template does.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

from dataflex.data.encoding.builtin_templates import FORMATS, NO_THOUGHT, Format, as_jinja, without_thoughts
from dataflex.data.sources.convert import Turn
from dataflex.utils.errors import UserError, brief, nearest
from dataflex.utils.logging import logger

Pair = tuple[str, str]


class Template(Protocol):
    """What the tokenisation needs of a template."""

    identity: str
    """Stable text that changes whenever the rendering does; part of the cache key."""
    end_of_turn: str
    """The token text that ends an answer ('' where there is none or it is not known)."""

    def pairs(self, turns: Sequence[Turn], where: str, last_only: bool = False) -> list[Pair]:
        """(prompt, answer) texts. With ``last_only`` only the last answer will be trained."""
        ...


def get_template(name: str | None, tokenizer: Any, thinks: bool = True, system: str | None = None) -> Template:
    """The named built-in template, or the tokenizer's own chat template where ``name`` is None.

    thinks: False of a model that shall answer without a thought (``enable_thinking: false``). system: the system
    prompt of conversations that have none (``default_system``); None: the template's own, if it has one.
    """
    if name is None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"template: the tokenizer has no chat template of its own; name one of {', '.join(sorted(FORMATS))}"
            )
        return ChatTemplate(tokenizer, thinks, system)
    if name not in FORMATS:
        raise UserError(
            f"template: '{name}' is not known{nearest(name, FORMATS)}; valid: {', '.join(sorted(FORMATS))}, "
            "or none for the tokenizer's chat template"
        )
    fmt = FORMATS[name] if thinks else without_thoughts(FORMATS[name])
    return BuiltInTemplate(name, fmt if system is None else replace(fmt, default_system=system), tokenizer)


class BuiltInTemplate:
    """A format of `builtin_templates` with the tokens of one tokenizer."""

    def __init__(self, name: str, fmt: Format, tokenizer: Any) -> None:
        self.name = name
        bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        parts = {
            part: (getattr(fmt, part) or fmt.user).replace("{bos}", bos).replace("{eos}", eos)
            for part in ("system", "user", "tool", "answer")
        }
        prefix = fmt.prefix.replace("{bos}", bos)
        self._format = replace(
            fmt,
            prefix=prefix,
            system=parts["system"],
            user=parts["user"],
            tool=parts["tool"],
            answer=parts["answer"],
        )
        self.end_of_turn = parts["answer"].partition("{content}")[2]
        if "{eos}" in fmt.answer and not eos:
            raise UserError(f"template: '{name}' ends an answer with the tokenizer's eos token, but it has none")
        vocabulary = tokenizer.get_vocab() if fmt.special_tokens else {}
        missing = [token for token in fmt.special_tokens if token not in vocabulary]
        if missing:
            _say_missing(name, tuple(missing))
        self.identity = f"{name}:{parts}:{prefix}:{fmt.after}:{fmt.default_system}:{fmt.thinks}" + (
            ":quiet" if fmt.quiet else ""
        )

    def chat_template(self, last_only: bool) -> str:
        """The same as Jinja, to be saved with a trained tokenizer. last_only: as `pairs` is called in training."""
        return as_jinja(self._format, forgets=last_only)

    def pairs(self, turns: Sequence[Turn], where: str, last_only: bool = False) -> list[Pair]:
        """See `Template`. An earlier thought is left out where only the last answer is trained."""
        fmt, turns = self._format, list(turns)
        system = turns.pop(0)[1] if turns[0][0] == "system" else fmt.default_system
        system = _fill(fmt.system, system) if system else ""
        opening = fmt.prefix + ("" if fmt.system_in_user else system)
        inside = system if fmt.system_in_user else ""
        pairs: list[Pair] = []
        for (role, question), (_, answer) in zip(turns[::2], turns[1::2], strict=True):
            prompt = opening + _fill((role == "tool" and fmt.tool) or fmt.user, inside + question)
            is_last = len(pairs) == len(turns) // 2 - 1
            if fmt.quiet and last_only and not is_last:
                prompt = prompt.removesuffix(NO_THOUGHT)
            pairs.append((prompt, _fill(fmt.answer, self._thought(answer, last_only and not is_last))))
            opening, inside = fmt.after, ""
        return pairs

    def _thought(self, answer: str, forget: bool) -> str:
        if not (self._format.thinks or self._format.quiet):
            return answer
        if forget or self._format.quiet:
            return re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL).lstrip("\n")
        return answer if "<think>" in answer or "</think>" in answer else NO_THOUGHT + answer


@cache
def _say_missing(name: str, tokens: tuple[str, ...]) -> None:
    """Once, although a run makes the template for each kind of its data."""
    logger.warning(
        f"template: '{name}' uses {', '.join(tokens)}, which the tokenizer does not know and spells "
        "in pieces; new_special_tokens adds such tokens"
    )


def _fill(part: str, content: str) -> str:
    before, _, after = part.partition("{content}")
    return before + content + after


class ChatTemplate:
    """The tokenizer's own chat template (Jinja)."""

    def __init__(self, tokenizer: Any, thinks: bool = True, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._options: dict[str, Any] = {} if thinks else {"enable_thinking": False}
        self._tokens = tuple(sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}))
        self._system = system
        source = repr(tokenizer.chat_template) + ("" if thinks else repr(self._options))
        source += "" if system is None else f":{system}"
        self.identity = f"chat:{hashlib.sha256(source.encode()).hexdigest()}"
        self.end_of_turn = self._find_end_of_turn()

    def _find_end_of_turn(self) -> str:
        try:
            _, answer = self.pairs([("user", "a"), ("assistant", "b")], "")[0]
        except UserError:
            return ""
        ends = [token for token in self._tokens if answer.endswith(token)]
        return max(ends, key=len, default="")

    def pairs(self, turns: Sequence[Turn], where: str, last_only: bool = False) -> list[Pair]:
        """See `Template`. The rendering up to each assistant turn must be the beginning of the next one.

        With ``last_only`` a template that renders earlier answers differently (it drops their thoughts) is
        fine: everything before the last answer is then one prompt.
        """
        if self._system is not None and turns[0][0] != "system":
            turns = [("system", self._system), *turns]
        answers = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
        done = ""
        pairs: list[Pair] = []
        for i in answers:
            prompt = self._render(turns[:i], True, where)
            whole = self._render(turns[: i + 1], False, where)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                if last_only and i != answers[-1]:
                    continue
                if last_only and whole.startswith(prompt):
                    done, pairs = "", []
                else:
                    raise UserError(
                        f"{where}: the tokenizer's chat template renders earlier turns differently from turn "
                        f"{i + 1} on, so the answers cannot be masked; use a named template or mask_history"
                    )
            answer = self._cut_after_end(whole[len(prompt) :])
            if not answer:
                raise UserError(f"{where}: the tokenizer's chat template renders nothing for turn {i + 1}")
            pairs.append((prompt[len(done) :], answer))
            done = prompt + answer
        return pairs

    def _render(self, turns: Sequence[Turn], opens_answer: bool, where: str) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=opens_answer, **self._options
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
