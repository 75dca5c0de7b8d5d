"""Rows of one to six turns: ids, labels, counts and weights of every token against a computation from scratch."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.data.encoding.encode import IGNORE_INDEX, encode_pairs, trained_count
from dataflex.data.encoding.template import get_template
from dataflex.data.encoding.token_weights import TokenWeights
from dataflex.data.encoding.tokenize import Encoder, Settings
from tests.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
TEMPLATE = get_template("default", TOKENIZER)
AFTER = 1  # the newline between an answer and the next turn
MODES = [{}, {"train_on_prompt": True}, {"mask_history": True}]


class Token(NamedTuple):
    """turn, and place in its prompt or answer."""

    id: int
    turn: int
    answer: bool
    place: int


def kept_tokens(
    pairs: list[tuple[list[int], list[int]]], cutoff_len: int, from_the_end: bool, after: int = 0
) -> list[Token]:
    """The tokens of a row that fit, in their order: turn by turn, as long as there is room.

    after: tokens at the beginning of each later prompt that share the room of the answer before.
    """
    room, kept = cutoff_len, []
    for turn in range(len(pairs))[:: -1 if from_the_end else 1]:
        begins = after if turn else 0
        prompt, answer = len(pairs[turn][0]) - begins, len(pairs[turn][1]) + after
        if prompt + answer > room:
            if 2 * answer < room:
                prompt = room - answer
            elif 2 * prompt < room:
                answer = room - prompt
            else:
                answer = room * answer // (prompt + answer)
                prompt = room - answer
        room -= prompt + answer
        own = min(answer, len(pairs[turn][1]))
        kept += [Token(pairs[turn][0][i], turn, False, i) for i in range(begins, begins + prompt)]
        kept += [Token(pairs[turn][1][i], turn, True, i) for i in range(own)]
        if turn + 1 < len(pairs):
            kept += [Token(pairs[turn + 1][0][i], turn + 1, False, i) for i in range(answer - own)]
    return sorted(kept, key=lambda token: (token.turn, token.answer, token.place))


def labels_of(kept: list[Token], turns: int, mode: dict[str, bool]) -> list[int]:
    def counts(token: Token) -> bool:
        if mode.get("mask_history"):
            return token.answer and token.turn == turns - 1
        return token.answer or mode.get("train_on_prompt", False)

    return [token.id if counts(token) else IGNORE_INDEX for token in kept]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=6),
    st.integers(1, 80),
    st.sampled_from(MODES),
)
def test_ids_and_labels_of_one_to_six_turns(
    sizes: list[tuple[int, int]], cutoff_len: int, mode: dict[str, bool]
) -> None:
    numbers = iter(range(1000))
    pairs = [([next(numbers) for _ in range(p)], [next(numbers) for _ in range(a)]) for p, a in sizes]
    ids, labels, cut = encode_pairs(pairs, cutoff_len, **mode)
    total = sum(map(sum, sizes))
    assert len(ids) == len(labels) == min(cutoff_len, total), "the room is used up and not overrun"
    assert cut == (total > cutoff_len)
    kept = kept_tokens(pairs, cutoff_len, mode.get("mask_history", False))
    assert ids == [token.id for token in kept]
    assert labels == labels_of(kept, len(pairs), mode)
    assert trained_count(labels) == len([label for label in labels[1:] if label >= 0])


WORDS = st.text("ab<>", min_size=1, max_size=9)
ROWS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6)
FACTORS = st.sampled_from([0.0, 0.5, 1.0, 2.0])


def row_of(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def encoded(rows: list[list[tuple[str, str]]], how: Settings, column: Any = None) -> dict[str, list[Any]]:
    return Encoder(TOKENIZER, TEMPLATE, how).batch(
        {
            "turns": [row_of(turns) for turns in rows],
            "where": [f"x:{i}" for i in range(len(rows))],
            "weight": [1.0] * len(rows),
            "kept": [""] * len(rows),
            "token_weight": column,
        }
    )


def pairs_of(turns: list[tuple[str, str]], last_only: bool = False) -> list[tuple[list[int], list[int]]]:
    texts = TEMPLATE.pairs([(t["role"], t["content"]) for t in row_of(turns)], "", last_only)
    return [tuple(TOKENIZER("".join(p), add_special_tokens=False)["input_ids"] for p in pair) for pair in texts]


@settings(deadline=None, max_examples=25)
@given(st.lists(ROWS, min_size=1, max_size=3), st.integers(1, 150), st.sampled_from(MODES))
def test_columns_of_a_batch_of_conversations(
    rows: list[list[tuple[str, str]]], cutoff_len: int, mode: dict[str, bool]
) -> None:
    got = encoded(rows, Settings("sft", cutoff_len, **mode))
    for i, turns in enumerate(rows):
        pairs = pairs_of(turns, mode.get("mask_history", False))
        kept = kept_tokens(pairs, cutoff_len, mode.get("mask_history", False), AFTER)
        labels = labels_of(kept, len(turns), mode)
        assert got["input_ids"][i] == [token.id for token in kept] and got["labels"][i] == labels
        assert got["length"][i] == len(kept) <= cutoff_len
        assert got["trained"][i] == sum(label != IGNORE_INDEX for label in labels[1:])
        assert got["truncated"][i] == (len(kept) < sum(len(p) + len(a) for p, a in pairs))


def span_factor(text: str, place: int, factor: float) -> float:
    """The factor of character ``place`` under the span from each ``<`` to the next ``>``, or to the end."""
    opened = text.find("<")
    while 0 <= opened <= place:
        closed = text.find(">", opened + 1)
        end = len(text) - 1 if closed < 0 else closed
        if place <= end:
            return factor
        opened = text.find("<", end + 1)
    return 1.0


@settings(deadline=None, max_examples=40)
@given(
    turns=ROWS,
    cutoff_len=st.integers(1, 150),
    by_turn=st.lists(FACTORS, max_size=4),
    roles=st.tuples(FACTORS, FACTORS),
    span=FACTORS,
    mask_history=st.booleans(),
    with_column=st.booleans(),
)
def test_weights_of_the_tokens_of_one_to_six_turns(
    turns: list[tuple[str, str]],
    cutoff_len: int,
    by_turn: list[float],
    roles: tuple[float, float],
    span: float,
    mask_history: bool,
    with_column: bool,
) -> None:
    weights = TokenWeights(roles[0], roles[1], tuple(by_turn), (("<", ">", span),), "given" if with_column else None)
    pairs = pairs_of(turns, mask_history)
    column = [0.5 + i for i in range(sum(len(answer) for _, answer in pairs))]
    got = encoded([turns], Settings("sft", cutoff_len, mask_history=mask_history, token_weights=weights), [column])
    answers = [
        "".join(a) for _, a in TEMPLATE.pairs([(t["role"], t["content"]) for t in row_of(turns)], "", mask_history)
    ]
    want = []
    for token in kept_tokens(pairs, cutoff_len, mask_history, AFTER):
        if not token.answer:
            want.append(roles[0])
            continue
        back = len(turns) - 1 - token.turn  # 0: the last turn
        of_turn = 1.0 if not by_turn else by_turn[-1 - back] if back < len(by_turn) else by_turn[0]
        text = answers[token.turn]
        place = len(TOKENIZER.decode(pairs[token.turn][1][: token.place]))
        before = sum(len(answer) for _, answer in pairs[: token.turn])
        of_column = column[before + token.place] if with_column else 1.0
        want.append(roles[1] * of_turn * span_factor(text, place, span) * of_column)
    assert got["token_weight"][0] == pytest.approx(want)
    assert len(got["token_weight"][0]) == len(got["input_ids"][0])
