"""Token ids and labels of one conversation, and the identity of a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

IGNORE_INDEX = -100

IdPair = tuple[list[int], list[int]]


def share_room(prompt: int, answer: int, room: int) -> tuple[int, int]:
    """How many tokens of a prompt and of its answer are kept where ``room`` tokens are left.

    As LLaMA-Factory shares them: the side below half the room is kept whole and the other one cut; where
    both are longer, in proportion to their lengths.
    """
    if answer * 2 < room:
        answer_room = room
    elif prompt * 2 < room:
        answer_room = room - prompt
    else:
        answer_room = int(room * (answer / (prompt + answer)))
    kept_answer = min(answer_room, answer)
    return min(max(room - kept_answer, 0), prompt), kept_answer


def encode_pairs(
    pairs: Sequence[IdPair],
    cutoff_len: int,
    train_on_prompt: bool = False,
    mask_history: bool = False,
    after: int = 0,
    end: int | None = None,
) -> tuple[list[int], list[int], bool]:
    """Join (prompt ids, answer ids) turn by turn into input_ids, labels (unshifted) and "was it cut?".

    Labels: -100 on prompts, the ids on answers; everywhere the ids with ``train_on_prompt``; only the last
    answer's with ``mask_history``, where the last turns also keep their tokens first. Turns beyond
    ``cutoff_len`` tokens are left out.

    after: so many tokens at the beginning of all prompts but the first stand after the answer before. They share its
    room, and the last answer's, where they do not stand, is counted too, as LLaMA-Factory does. end: a token after the
    last answer that is predicted after every trained one, as the label of the first token of the next prompt.
    """
    assert not (train_on_prompt and (mask_history or end is not None)), "the configuration refuses both at once"
    total = sum(len(p) + len(a) for p, a in pairs) + (end is not None)
    behind = [prompt[:after] for prompt, _ in pairs[1:]] + [[]]
    turns = [(pair[0][after if i else 0 :], pair[1], behind[i]) for i, pair in enumerate(pairs)]
    kept: list[tuple[list[int], list[int]]] = []
    room = cutoff_len - (end is not None)
    for prompt, answer, rest in reversed(turns) if mask_history else turns:
        if room <= 0:
            break
        prompt_len, answer_len = share_room(len(prompt), len(answer) + after, room)
        trained = not (mask_history and kept)
        rest = rest[: max(0, answer_len - len(answer))]
        ids = prompt[:prompt_len] + answer[:answer_len]
        prompt_labels = prompt[:prompt_len] if train_on_prompt else [IGNORE_INDEX] * prompt_len
        if end is not None and kept and not mask_history:
            prompt_labels[:1] = [end] * len(prompt_labels[:1])
        answer_labels = answer[:answer_len] if trained else [IGNORE_INDEX] * len(answer[:answer_len])
        rest_labels = rest if train_on_prompt else [IGNORE_INDEX] * len(rest)
        kept.append((ids + rest, prompt_labels + answer_labels + rest_labels))
        room -= prompt_len + answer_len
    if mask_history:
        kept.reverse()
    input_ids = [token for ids, _ in kept for token in ids]
    labels = [label for _, labels in kept for label in labels]
    if end is not None:
        input_ids.append(end)
        labels.append(end)
    return input_ids, labels, len(input_ids) < total


def trained_count(labels: Sequence[int]) -> int:
    """How many tokens count in the loss: the first has no context, so its label never counts."""
    return sum(label != IGNORE_INDEX for label in labels[1:])


def digest_of(input_ids: Sequence[int] | np.ndarray, labels: Sequence[int] | np.ndarray) -> int:
    """A signed 64-bit hash by which identical samples are found."""
    digest = hashlib.blake2b(np.asarray(input_ids, dtype=np.int64).tobytes(), digest_size=8)
    digest.update(np.asarray(labels, dtype=np.int64).tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


# White space, case, accents, digits and other scripts: what tokenizers treat otherwise than letters.
_PROBE = " The  caf\u00e9\n\t\u4e2d\u6587 0123 x_y"


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of everything that decides how text becomes ids; the same in every process.

    What a tokenizer keeps beside its vocabulary and rules (as ``split_special_tokens``) is known by what it makes of a
    short text with its special tokens in it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):
            state.pop(passing, None)
    else:
        state = sorted(tokenizer.get_vocab().items())
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    texts = [_PROBE, _PROBE.join(["", *sorted(map(str, tokenizer.all_special_tokens)), ""])]
    made = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    made.append(tokenizer("")["input_ids"])
    text = json.dumps([type(tokenizer).__name__, state, special, made], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
