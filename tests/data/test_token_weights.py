"""Weights that the data brings: expressions, .npy files, token weights by role, turn, span and column."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.config import Config
from dataflex.config.sections.weighting import WeightingSection
from dataflex.data.encoding.collate import Collator
from dataflex.data.encoding.token_weights import TokenWeights, span_factors
from dataflex.data.pool import Pool
from dataflex.data.sources.expression import Expression, is_expression
from dataflex.utils.errors import UserError
from tests.data.helpers import load, numbered

Add = Callable[..., Any]
MakeConfig = Callable[..., Config]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a + 2 * b", 7.0), ("-a ** 2 / b", -1 / 3), ("a * (b > 2)", 1.0), ("min(a, b, 0.5)", 0.5), ("b % 2", 1.0),
        ("a >= 1", 1.0), ("a > 1", 0.0), ("a <= 1", 1.0), ("a < 1", 0.0), ("a == 1", 1.0), ("a != 1", 0.0),
        ("sqrt(abs(a - b - 2))", 2.0), ("log(exp(b))", 3.0), ("1 / (a - 1)", float("nan")),
        ("(a - 9) ** 0.5", float("nan")), ("10 ** 400 * a", float("nan")),
    ],
)  # fmt: skip
def test_expressions(text: str, want: float) -> None:
    assert is_expression(text)
    expression = Expression(text)
    assert set(expression.columns) <= {"a", "b"}
    np.testing.assert_allclose(expression({"a": 1.0, "b": 3.0}), want)


@pytest.mark.parametrize("name", ["quality", "quality-score", "my weight", "a.b"])
def test_names_are_columns(name: str) -> None:
    assert not is_expression(name)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("__import__('os').system('x')", r"unknown call '__import__"),
        ("a.__class__ + 1", r"'a.__class__' is not arithmetic"),
        ("[a for a in (1, 2)]", "is not arithmetic"),
        ("(lambda: a)()", "unknown call"),
        ("squrt(a)", r"unknown call 'squrt\(a\)' \(did you mean 'sqrt'\?\); valid: numbers, columns"),
        ("a + 'x'", "'x'' is not arithmetic"),
        ("1 + 1", "names no column"),
        ("a +", "is not an expression"),
        ("min(a)", "wrong number of arguments"),
        ("a if b else (c)", "is not arithmetic"),
    ],
)
def test_an_expression_runs_no_code(text: str, why: str) -> None:
    with pytest.raises(UserError, match=f"sample_weight: .*{why}"):
        Expression(text)


def test_sample_weights_by_expression_and_file(add: Add, config: MakeConfig, tmp_path: Path) -> None:
    path = add("x", [row | {"w": i, "v": 2} for i, row in enumerate(numbered(3))])
    out = load(config("x", sample_weight="w / v + (w > 1)"))
    assert out.train.sample_weights is not None and out.train.sample_weights.tolist() == [0.0, 0.5, 2.0]
    with pytest.raises(UserError, match=rf"{path}:1: sample_weight: '1 / \(w \* v\)' is nan, expected a number >= 0"):
        load(config("x", sample_weight="1 / (w * v)"))
    with pytest.raises(UserError, match=r"x.json:1: no column 'u' \(sample_weight\) \(did you mean 'uu'"):
        add("named", [row | {"uu": 1} for row in numbered(2)], file="x.json")
        load(config("named", sample_weight="u + 1"))
    add("bad", [row | {"w": "many"} for row in numbered(2)])
    with pytest.raises(UserError, match=r"bad.json:1: w \(in sample_weight\): expected a number, got 'many'"):
        load(config("bad", sample_weight="w + 1"))


def test_sample_weights_from_a_file_follow_the_rows(add: Add, config: MakeConfig, tmp_path: Path) -> None:
    add(
        "x",
        [{"instruction": "q", "output": "a"}, {"instruction": "q", "output": ""}, {"instruction": "q", "output": "b"}],
    )
    add("y", numbered(2))
    file = tmp_path / "w.npy"
    np.save(file, np.array([1.0, 9.0, 2.0, 3.0, 4.0]))
    out = load(config("x", "y", sample_weight=str(file)))
    assert out.train.sample_weights is not None and out.train.sample_weights.tolist() == [1.0, 2.0, 3.0, 4.0]
    for values, text in (
        ([1.0] * 6, r"w.npy has 6 numbers, the datasets have 5 rows \(x 3, y 2\)"),
        ([1.0] * 4, r"w.npy has 4 numbers, the datasets have at least 5 rows"),
        ([1, 1, 1, np.nan, 1], r"w.npy: dataset y: expected numbers >= 0, got nan at 0"),
        ([1, 1, -2.0, 1, 1], r"w.npy: dataset x: expected numbers >= 0, got -2 at 2"),
        ([[1.0]], r"expected one number per row, got float64 \(1, 1\)"),
    ):
        np.save(file, np.array(values))
        with pytest.raises(UserError, match=text):
            load(config("x", "y", sample_weight=str(file)))


TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "<t>no</t>yes"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "ok #7"},
]


def weighted(add: Add, config: MakeConfig, **keys: Any) -> tuple[str, list[float]]:
    """The text of the one sample's trained tokens (bytes), and their weights."""
    more = {"per_token": keys.pop("column")} if "column" in keys else {}
    add("talk", [{"messages": TALK, **more}], formatting="openai", columns={"messages": "messages"})
    cfg = config("talk", train_on_prompt=keys.pop("train_on_prompt", False), cutoff_len=keys.pop("cutoff_len", 512))
    sample = load(cfg.model_copy(update={"weighting": WeightingSection(**keys)})).train[0]
    trained = [
        (i, w)
        for i, label, w in zip(sample["input_ids"], sample["labels"], sample["token_weight"], strict=True)
        if label >= 0
    ]
    from tests.tiny import byte_tokenizer

    return byte_tokenizer().decode([i for i, _ in trained]), [round(w, 6) for _, w in trained]


def test_weights_by_turn(add: Add, config: MakeConfig) -> None:
    text, weights = weighted(add, config, turn_weights=[0, 1])
    first = next(i for i, w in enumerate(weights) if w == 1)
    assert text.startswith("<t>no</t>yes") and set(weights[:first]) == {0.0} and set(weights[first:]) == {1.0}
    assert len(weights[first:]) == len("ok #7") + 1, "the end token counts with its turn"


@pytest.mark.parametrize(
    ("weights", "turns", "found"),
    [((1, 2, 3), 2, [2, 3]), ((1, 2), 3, [1, 1, 2]), ((1, 2), 2, [1, 2]), ((4,), 2, [4, 4]), ((), 2, [1, 1])],
)
def test_turns_are_counted_from_the_last(weights: tuple[float, ...], turns: int, found: list[float]) -> None:
    assert [TokenWeights(turns=weights).turn(index, turns) for index in range(turns)] == found


def test_a_column_goes_on_from_turn_to_turn() -> None:
    answers: Any = [("x", None)] * 3
    made = TokenWeights(column="w").of_pairs([(1, 1), (0, 2), (2, 1)], answers, [5, 6, 7, 8], "row 1")
    assert made == [([1.0], [5.0]), ([], [6.0, 7.0]), ([1.0, 1.0], [8.0])]


def test_a_span_ends_behind_its_own_start() -> None:
    assert span_factors("aaba", [(i, i + 1) for i in range(4)], [("aa", "a", 2.0)]) == [2.0] * 4


def test_weights_are_cut_as_the_ids_are_where_only_the_last_answer_is_trained(add: Add, config: MakeConfig) -> None:
    add("talk", [{"messages": TALK}], formatting="openai", columns={"messages": "messages"})
    cfg = config("talk", mask_history=True, cutoff_len=24)
    sample = load(cfg.model_copy(update={"weighting": WeightingSection(turn_weights=[3, 5])})).train[0]
    answer = [w for w, label in zip(sample["token_weight"], sample["labels"], strict=True) if label >= 0]
    assert len(sample["token_weight"]) == len(sample["input_ids"]) == 23, "the template's newline has a place"
    assert answer and set(answer) == {5.0} and 5.0 not in sample["token_weight"][: -len(answer)]


def test_weights_by_span(add: Add, config: MakeConfig) -> None:
    spans = {"<t>": ["</t>", 0.25], "#": [None, 2.0]}
    text, weights = weighted(add, config, token_weight_spans=spans, role_weights={"answer": 3.0})
    assert weights[: len("<t>no</t>")] == [0.75] * len("<t>no</t>")
    assert weights[len("<t>no</t>") : len("<t>no</t>yes")] == [3.0] * 3
    assert weights[-6:] == [3.0, 3.0, 3.0, 6.0, 6.0, 6.0], "from # to the end of the turn"


def test_weights_by_role_and_column(add: Add, config: MakeConfig) -> None:
    _, weights = weighted(add, config, role_weights={"prompt": 0.5}, train_on_prompt=True)
    assert set(weights) == {0.5, 1.0}
    count = len("<t>no</t>yes") + len("ok #7") + 2
    column = [i / 8 for i in range(count)]
    _, weights = weighted(add, config, token_weight="per_token", column=column)
    assert weights == [round(c, 6) for c in column]
    text = rf"talk.json:1: per_token: expected {count} numbers, one per token of the answers, got 3"
    with pytest.raises(UserError, match=text):
        weighted(add, config, token_weight="per_token", column=[1, 2, 3])
    with pytest.raises(UserError, match=r"talk.json:1: per_token: expected numbers >= 0, got -1 at 1"):
        weighted(add, config, token_weight="per_token", column=[1, -1, 3])
    with pytest.raises(UserError, match=r"talk.json:1: per_token: expected a list of numbers, got int 3"):
        weighted(add, config, token_weight="per_token", column=3)


def test_weights_are_cut_with_the_ids(add: Add, config: MakeConfig) -> None:
    text, weights = weighted(add, config, turn_weights=[1, 0.5], cutoff_len=38)
    _, whole = weighted(add, config, turn_weights=[1, 0.5])
    assert len(weights) < len(whole) and set(weights) == {1.0, 0.5}


def test_an_unclosed_span_reaches_to_the_end_and_overlaps_multiply() -> None:
    places = [(i, i + 1) for i in range(6)]
    assert span_factors("ab[cd]", places, (("[", "]", 0.5), ("c", None, 3.0))) == [1, 1, 0.5, 1.5, 1.5, 1.5]
    assert span_factors("a[b[cd", places, (("[", "]", 0.5),)) == [1, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert TokenWeights(turns=(0.1, 0.2)).turn(0, 4) == 0.1 and TokenWeights(turns=(0.1, 0.2)).turn(3, 4) == 0.2


@pytest.mark.parametrize("packing", [False, True])
def test_the_collator_keeps_weights_beside_their_tokens(packing: bool) -> None:
    rows = [[5, 6, 7], [8, 9], [4, 3, 2]]
    samples = [{"input_ids": row, "labels": row, "token_weight": [i / 10 for i in row]} for row in rows]
    batch = Collator(0, packing=packing, cutoff_len=6)(samples)
    real = batch["input_ids"] != 0
    torch.testing.assert_close(batch["token_weight"][real], batch["input_ids"][real] / 10)
    assert (batch["token_weight"][~real] == 1).all()


def sample(**weights: Any) -> dict[str, Any]:
    return {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], **weights}


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        ([sample(sample_weight=1.0), sample()], "sample 1 has no sample_weight, others have it"),
        ([sample(), sample(sample_weight=1.0)], "sample 1 has a sample_weight, others have none"),
        ([sample(sample_weight=float("nan"))], "sample 0: sample_weight: expected numbers >= 0, got nan"),
        ([sample(sample_weight=-1)], "sample 0: sample_weight: expected numbers >= 0, got -1"),
        ([sample(sample_weight="x")], "sample 0: sample_weight: expected 1 numbers >= 0, got"),
        ([sample(token_weight=[1.0, 2.0])], r"sample 0: token_weight: expected 3 numbers, got shape \(2,\)"),
        ([sample(token_weight=[1.0, -2.0, 1])], "sample 0: token_weight: expected numbers >= 0, got -2 at 1"),
    ],
)
def test_wrong_weights_of_objects_are_refused(samples: list[Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        Pool.from_datasets(samples)


def test_weights_of_objects_reach_the_pool_and_its_fingerprint() -> None:
    import datasets

    one = Pool.from_datasets({"a": [sample(sample_weight=1.0)], "b": [sample(sample_weight=2.0)]})
    assert one.sample_weights is not None and one.sample_weights.tolist() == [1.0, 2.0]
    rows = [sample(sample_weight=0.5, token_weight=[1.0, 1.0, 0.5])] * 2
    listed, table = Pool.from_datasets(rows), Pool.from_datasets(datasets.Dataset.from_list(rows))
    assert listed.fingerprint == table.fingerprint
    assert table.sample_weights is not None and table.sample_weights.tolist() == [0.5, 0.5]
    assert listed.fingerprint != Pool.from_datasets([sample(sample_weight=0.5)] * 2).fingerprint
    with pytest.raises(UserError, match="train_dataset 'b': has no sample_weight, other datasets have it"):
        Pool.from_datasets({"a": [sample(sample_weight=1.0)], "b": [sample()]})
