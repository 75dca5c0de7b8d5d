"""Weights of tokens, made when rows are tokenised: by role, by turn, by spans of the text, or from a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dataflex.utils.errors import UserError

Spans = Mapping[str, tuple[str | None, float]]


@dataclass(frozen=True)
class TokenWeights:
    """What multiplies the loss of a token; what is not named weighs 1, and all that applies is multiplied.

    prompt, answer: by role. turns: of the assistant's turns, the last turn's last; turns further back than the list
    have its first. spans: {start: (end or None, weight)}: the text of an answer from ``start`` to the end of the next
    ``end``, or to the end of the answer. column: one number per token of a row's answers, in order.
    """

    prompt: float = 1.0
    answer: float = 1.0
    turns: tuple[float, ...] = ()
    spans: tuple[tuple[str, str | None, float], ...] = ()
    column: str | None = None

    def parts(self) -> list[Any]:
        """What the fingerprint of a tokenised dataset covers."""
        return [self.prompt, self.answer, self.turns, self.spans, self.column]

    def turn(self, index: int, turns: int) -> float:
        """The weight of assistant turn ``index`` out of ``turns``."""
        return self.turns[max(0, len(self.turns) - turns + index)] if self.turns else 1.0

    def of_answer(self, index: int, turns: int) -> float:
        """The weight of a token of the answer of assistant turn ``index`` out of ``turns``, by role and turn."""
        return self.answer * self.turn(index, turns)

    def of_pairs(
        self,
        lengths: Sequence[tuple[int, int]],
        answers: Sequence[tuple[str, Sequence[tuple[int, int]] | None]],
        column: Sequence[float] | None,
        where: str,
    ) -> list[tuple[list[float], list[float]]]:
        """Weights of the tokens of each (prompt, answer) pair of a row.

        lengths: tokens of the pairs. answers: text, and each token's (first, end) characters. column: the row's.
        UserError where the column does not fit.
        """
        given = list(column) if column is not None else None
        wanted = sum(answer for _, answer in lengths)
        if given is not None and len(given) != wanted:
            raise UserError(
                f"{where}: {self.column}: expected {wanted} numbers, one per token of the answers, got {len(given)}"
            )
        made, at = [], 0
        for turn, ((prompt, answer), (text, places)) in enumerate(zip(lengths, answers, strict=True)):
            weights = [self.of_answer(turn, len(lengths))] * answer
            if self.spans:
                assert places is not None
                weights = [w * f for w, f in zip(weights, span_factors(text, places, self.spans), strict=True)]
            if given is not None:
                weights = [w * f for w, f in zip(weights, given[at : at + answer], strict=True)]
            made.append(([self.prompt] * prompt, weights))
            at += answer
        return made


def span_factors(
    text: str, places: Sequence[tuple[int, int]], spans: Sequence[tuple[str, str | None, float]]
) -> list[float]:
    """The factor of each token: the product of the weights of the spans that its first character lies in."""
    factors = [1.0] * len(places)
    for start, end, weight in spans:
        at = text.find(start)
        while at >= 0:
            found = -1 if end is None else text.find(end, at + len(start))
            stop = len(text) if end is None or found < 0 else found + len(end)
            for token, (first, _) in enumerate(places):
                if at <= first < stop:
                    factors[token] *= weight
            at = text.find(start, max(stop, at + 1))
    return factors
