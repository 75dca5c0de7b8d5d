"""A conversation becomes (prompt, answer) texts, one pair for each assistant turn, in order.

A text is given in pieces that are tokenised each by itself, as LLaMA-Factory does. The concatenation of all pairs is
the whole conversation. The answer is what is trained: the assistant's text with its end-of-turn token. Special tokens
that stand in the data itself are tokenised as such, as the model's own chat template does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Protocol

from dataflex.data.encoding.chat_template import ChatTemplate
from dataflex.data.encoding.formats import Format, find_format, packaged_formats
from dataflex.data.encoding.rounds import Pair, Pieces, Round, calls_of, rounds_of
from dataflex.data.encoding.saved_template import as_jinja
from dataflex.data.encoding.tools import called, described
from dataflex.data.sources.convert import Turn
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

_TOKEN = re.compile(r"(\{bos\}|\{eos\})")


class Template(Protocol):
    """What the tokenisation needs of a template."""

    identity: str
    """Stable text that changes whenever the rendering does; part of the cache key."""
    end_of_turn: str
    """The token text that ends an answer ('' where there is none or it is not known)."""
    after: Pieces
    """What the prompts of all but the first pair begin with: it belongs to the answer before, and is not trained."""
    ends_with_eos: bool
    """Whether the eos token stands after the last answer, beyond the pairs, and is predicted after the others."""

    def pairs(self, turns: Sequence[Turn], where: str, last_only: bool = False) -> list[Pair]:
        """(prompt, answer) texts. With ``last_only`` only the last answer will be trained."""
        ...


def get_template(name: str | None, tokenizer: Any, thinks: bool = True, system: str | None = None) -> Template:
    """The template of a name (see `find_format`), or the tokenizer's own chat template where ``name`` is None.

    thinks: False of a model that shall answer without a thought (``enable_thinking: false``). system: the system
    prompt of conversations that have none (``default_system``); None: the template's own, if it has one.
    """
    if name is None:
        if not getattr(tokenizer, "chat_template", None):
            names = ", ".join(sorted(packaged_formats()))
            raise UserError(f"template: the tokenizer has no chat template of its own; name one of {names}")
        return ChatTemplate(tokenizer, thinks, system)
    fmt = find_format(name)
    quiet = bool(fmt.thought) and not thinks
    return BuiltInTemplate(name, fmt if system is None else replace(fmt, default_system=system), tokenizer, quiet)


@dataclass(frozen=True)
class _Part:
    """A text of a format around its content, in pieces; ``left`` and ``right`` are of the content's own piece."""

    before: Pieces
    left: str
    right: str
    behind: Pieces

    def __call__(self, content: str) -> Pieces:
        return (*self.before, self.left + content + self.right, *self.behind)


class BuiltInTemplate:
    """A `Format` with the tokens of one tokenizer.

    quiet: thoughts are dropped, and an empty one opens the answer, untrained.
    """

    def __init__(self, name: str, fmt: Format, tokenizer: Any, quiet: bool = False) -> None:
        self.name, self.quiet = name, quiet
        self._tokens = {"{bos}": tokenizer.bos_token or "", "{eos}": tokenizer.eos_token or ""}
        if not self._tokens["{eos}"] and ("{eos}" in fmt.answer or fmt.ends_with_eos):
            raise UserError(f"template: '{name}' ends an answer with the tokenizer's eos token, but it has none")
        self._format = fmt
        self._parts = {
            "system": self._part(fmt.system),
            "user": self._part(fmt.user),
            "tool": self._part(fmt.tool or fmt.user),
            "answer": self._part(fmt.answer),
            "call": self._part(fmt.call or fmt.answer),
        }
        self.after, self.ends_with_eos = self._pieces(fmt.after), fmt.ends_with_eos
        end = "".join([self._parts["answer"].right, *self._parts["answer"].behind]).strip()
        self.end_of_turn = end or (self._tokens["{eos}"] if fmt.ends_with_eos else "")
        vocabulary = tokenizer.get_vocab() if fmt.special_tokens else {}
        missing = [token for token in fmt.special_tokens if token not in vocabulary]
        if missing:
            _say_missing(name, tuple(missing))
        self.identity = json.dumps([asdict(fmt), self._tokens, quiet], sort_keys=True)

    def _pieces(self, text: str) -> Pieces:
        """A text that holds no content, its tokens filled in."""
        pieces = (self._tokens.get(piece, piece) for piece in _TOKEN.split(text))
        return tuple(piece for piece in pieces if piece)

    def _part(self, text: str) -> _Part:
        before, _, behind = text.partition("{content}")
        *first, left = _TOKEN.split(before)
        right, *last = _TOKEN.split(behind)
        return _Part(self._pieces("".join(first)), left, right, self._pieces("".join(last)))

    def chat_template(self, last_only: bool) -> str:
        """The same as Jinja, to be saved with a trained tokenizer. last_only: as `pairs` is called in training."""
        return as_jinja(self._format, self._tokens, quiet=self.quiet, forgets=last_only)

    def pairs(self, turns: Sequence[Turn], where: str, last_only: bool = False) -> list[Pair]:
        """See `Template`. An earlier thought is left out where only the last answer is trained."""
        fmt, conversation = self._format, rounds_of(turns)
        system = fmt.default_system if conversation.system is None else conversation.system
        if conversation.tools:
            system += described(fmt.tools, conversation.tools, where)
        stated = self._parts["system"](system) if system else ()
        opening = self._pieces(fmt.prefix) + (() if fmt.system_in_user else stated)
        inside = "".join(stated) if fmt.system_in_user else ""
        pairs: list[Pair] = []
        for number, each in enumerate(conversation.rounds, start=1):
            content = inside + fmt.between_results.join(each.asked)
            prompt = opening + self._parts["tool" if each.results else "user"](content)
            is_last = number == len(conversation.rounds)
            if self.quiet and not (last_only and not is_last):
                prompt = (*prompt, fmt.empty_thought)
            pairs.append((prompt, self._answer(each, where, last_only and not is_last)))
            opening, inside = self.after, ""
        return pairs

    def _answer(self, each: Round, where: str, forget: bool) -> Pieces:
        """The pieces of an answer, with its thought, an empty one or none."""
        fmt, text = self._format, each.answer
        thought: Pieces = ()
        if fmt.thought:
            opens, closes = (word.strip() for word in fmt.thought)
            if forget or self.quiet:
                text = re.sub(f"{re.escape(opens)}.*?{re.escape(closes)}", "", text, flags=re.DOTALL).lstrip("\n")
            elif opens not in text and closes not in text:
                thought = (fmt.empty_thought,)
        if not each.calls:
            return thought + self._parts["answer"](text)
        around, calls = calls_of(text, where)
        return thought + self._parts["call"](around + called(fmt.tools, calls, where))


@cache
def _say_missing(name: str, tokens: tuple[str, ...]) -> None:
    """Once, although a run makes the template for each kind of its data."""
    logger.warning(
        f"template: '{name}' uses {', '.join(tokens)}, which the tokenizer does not know and spells "
        "in pieces; new_special_tokens adds such tokens"
    )
