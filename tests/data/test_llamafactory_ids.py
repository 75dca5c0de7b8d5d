"""Every template against token ids and labels that LLaMA-Factory itself made of the same rows.

``llamafactory_ids.json`` holds ids alone; ``python benchmarks/against_llamafactory.py --golden FILE`` makes it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.data.encoding.encode import IGNORE_INDEX, encode_pairs
from dataflex.data.encoding.formats import packaged_formats
from tests.distributed import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import llamafactory_cases as cases  # noqa: E402
import llamafactory_side as side  # noqa: E402

GOLDEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "llamafactory_ids.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return cases.tokenizer()


def test_every_template_has_its_ids() -> None:
    assert set(GOLDEN) == set(packaged_formats())


@pytest.mark.parametrize("name", GOLDEN)
def test_ids_and_labels_are_those_of_llamafactory(name: str, tokenizer: Any) -> None:
    known = dict(cases.numbered())
    assert len(GOLDEN[name]) >= 10
    for number, kept in GOLDEN[name].items():
        ids, labels = cases.ours(side.as_theirs(name), known[number], tokenizer)
        assert ids == kept["ids"], (number, tokenizer.decode(ids), tokenizer.decode(kept["ids"]))
        assert labels == side.labels_of(kept), number


def test_what_stands_after_an_answer_is_all_that_differs(tokenizer: Any) -> None:
    """The formats as they are, uncut: LLaMA-Factory's ids but for the end, its labels but for what is after answers."""
    turns = dict(cases.numbered())["multi-turn 1"]
    for name, fmt in packaged_formats().items():
        after = len(tokenizer(fmt.after, add_special_tokens=False)["input_ids"])
        ids, labels = cases.ours(name, turns, tokenizer)
        theirs, there = cases.ours(side.as_theirs(name), turns, tokenizer)
        assert ids == (theirs[:-after] if after else theirs)
        assert sum(a != b for a, b in zip(labels, there, strict=False)) == after  # between the two rounds


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(1, 50),
    st.integers(0, 2),
    st.booleans(),
)
def test_untrained_text_after_answers_is_cut_as_if_it_were_theirs(
    sizes: list[tuple[int, int]], cutoff_len: int, after: int, mask_history: bool
) -> None:
    """``after`` tokens between rounds, against the same tokens at the end of the answers: the same ids are kept."""
    numbers = iter(range(10**6))
    make = [[next(numbers) for _ in range(size)] for pair in sizes for size in pair]
    rest = [10**6 + i for i in range(after)]
    prompts, answers = make[::2], make[1::2]
    mine = [((rest if i else []) + p, a) for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]
    theirs = [(p, a + rest) for p, a in zip(prompts, answers, strict=True)]
    ids, labels, _ = encode_pairs(mine, cutoff_len, mask_history=mask_history, after=after)
    other, there, _ = encode_pairs(theirs, cutoff_len, mask_history=mask_history)
    last = answers[-1][-1]
    end = other.index(last) + 1 if last in other else len(other)
    assert ids == other[:end]
    assert labels == [IGNORE_INDEX if label >= 10**6 else label for label in there[:end]]


def test_end_is_the_label_of_what_follows_a_trained_answer() -> None:
    pairs = [([1, 2], [3]), ([4, 5], [6]), ([7], [8])]
    none = IGNORE_INDEX
    assert encode_pairs(pairs, 99, end=0) == ([1, 2, 3, 4, 5, 6, 7, 8, 0], [none, none, 3, 0, none, 6, 0, 8, 0], False)
    assert encode_pairs(pairs, 99, mask_history=True, end=0)[1] == [none] * 7 + [8, 0]
    ids, labels, cut = encode_pairs(pairs, 6, end=0)
    assert (ids, labels, cut) == ([1, 2, 3, 4, 5, 0], [none, none, 3, 0, none, 0], True)
