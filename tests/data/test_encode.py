"""Sharing cutoff_len between prompts and answers, and what the labels say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.data.encoding.encode import digest_of, encode_pairs, share_room, tokenizer_identity, trained_count
from tests.tiny import byte_tokenizer

PAIRS = [([1, 2, 3], [11, 12]), ([4, 5], [13, 14, 15])]


@pytest.mark.parametrize(
    ("prompt", "answer", "room", "kept"),
    [
        (10, 10, 100, (10, 10)),
        (100, 10, 50, (40, 10)),
        (10, 100, 50, (10, 40)),
        (60, 40, 50, (30, 20)),
        (300, 100, 40, (30, 10)),
        (5, 5, 1, (1, 0)),
        (0, 30, 20, (0, 20)),
    ],
)
def test_shares(prompt: int, answer: int, room: int, kept: tuple[int, int]) -> None:
    assert share_room(prompt, answer, room) == kept


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 500))
def test_shares_fill_the_room_and_no_more(prompt: int, answer: int, room: int) -> None:
    kept_prompt, kept_answer = share_room(prompt, answer, room)
    assert 0 <= kept_prompt <= prompt and 0 <= kept_answer <= answer
    assert kept_prompt + kept_answer == min(room, prompt + answer)


def test_every_answer_is_trained() -> None:
    ids, labels, cut = encode_pairs(PAIRS, 100)
    assert ids == [1, 2, 3, 11, 12, 4, 5, 13, 14, 15]
    assert labels == [-100, -100, -100, 11, 12, -100, -100, 13, 14, 15]
    assert not cut


def test_train_on_prompt_trains_everything() -> None:
    ids, labels, _ = encode_pairs(PAIRS, 100, train_on_prompt=True)
    assert labels == ids


def test_mask_history_trains_the_last_answer() -> None:
    _, labels, _ = encode_pairs(PAIRS, 100, mask_history=True)
    assert labels == [-100] * 7 + [13, 14, 15]


def test_truncation_goes_turn_by_turn() -> None:
    ids, labels, cut = encode_pairs(PAIRS, 8)
    assert ids == [1, 2, 3, 11, 12, 4, 5, 13]
    assert labels == [-100, -100, -100, 11, 12, -100, -100, 13]
    assert cut
    assert encode_pairs(PAIRS, 5) == ([1, 2, 3, 11, 12], [-100, -100, -100, 11, 12], True)


def test_mask_history_keeps_the_last_turns_first() -> None:
    ids, labels, cut = encode_pairs(PAIRS, 7, mask_history=True)
    assert ids == [1, 2, 4, 5, 13, 14, 15]
    assert labels == [-100, -100, -100, -100, 13, 14, 15]
    assert cut


def test_the_first_label_never_counts() -> None:
    assert trained_count([5, 6, -100, 7]) == 2
    assert trained_count([5]) == 0


def test_digests_tell_ids_from_labels() -> None:
    assert digest_of([1, 2], [1, 2]) == digest_of([1, 2], [1, 2])
    assert len({digest_of([1, 2], [1, 2]), digest_of([1, 2], [-100, 2]), digest_of([1, 3], [1, 2])}) == 3


def test_tokenizer_identity_ignores_passing_state() -> None:
    tokenizer = byte_tokenizer()
    before = tokenizer_identity(tokenizer)
    tokenizer(["abc", "d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_identity(tokenizer) == before
    assert tokenizer_identity(byte_tokenizer(eos=False)) != before
