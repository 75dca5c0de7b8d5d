"""Pools over any map-style datasets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from dataflex.data.pool import Pool, describe_sample
from dataflex.utils.errors import UserError
from tests.tiny import byte_tokenizer

A = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
B = [{"input_ids": [6, 7, 8, 9], "labels": [-100, -100, 8, 9]}]


class Plain:
    """A map-style dataset without anything else."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def test_domains_are_concatenated_in_order() -> None:
    pool = Pool.from_datasets({"a": Plain(A), "b": Dataset.from_list(B)})
    assert len(pool) == 3
    assert pool.domain_names == ["a", "b"]
    assert pool.domain_ids.tolist() == [0, 0, 1] and pool.domain_ids.dtype == np.int32
    assert pool.lengths.tolist() == [3, 2, 4] and pool.lengths.dtype == np.int32
    assert pool.domain_sizes().tolist() == [2, 1]
    assert pool[np.int64(2)]["input_ids"] == [6, 7, 8, 9]
    with pytest.raises(IndexError):
        pool[3]


def test_one_dataset_is_one_domain_and_a_pool_stays_itself() -> None:
    pool = Pool.from_datasets(Plain(A))
    assert pool.domain_names == ["train"]
    assert Pool.from_datasets(pool) is pool


def test_the_fingerprint_is_the_content() -> None:
    tensors = [{k: torch.tensor(v) for k, v in item.items()} for item in A]
    stored = Dataset.from_list(A)
    shuffled = Dataset.from_list(A[::-1]).select([1, 0])
    same = [Plain(A), Plain(tensors), stored, shuffled, stored.with_format("torch")]
    assert len({Pool.from_datasets(dataset).fingerprint for dataset in same}) == 1
    moved = [{**A[0], "labels": [1, 2, 3]}, A[1]]
    joined = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3, 4, 5], "labels": [3, 4, 5]}]
    others = [
        Plain(moved),
        Plain(A[::-1]),
        Plain(joined),
        {"other": Plain(A)},
        {"a": Plain(A), "b": Plain(B)},
    ]
    prints = {Pool.from_datasets(dataset).fingerprint for dataset in [*same[:1], *others]}
    assert len(prints) == 1 + len(others)


@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        (Plain([]), "train_dataset: is empty"),
        ({}, "train_dataset: there is no dataset in the mapping"),
        (iter(A), "has no length; sample ids need a map-style dataset"),
        (Plain([3]), "train_dataset: sample 0 is a int, not a dict"),
        (Plain([A[0], {"input_ids": [1]}]), "sample 1: has no labels; it has input_ids"),
        (Plain([A[0], {"input_ids": [1], "labels": [1, 2]}]), "sample 1 has 1 input_ids but 2 labels"),
        (
            {"a": Plain(A), "b": Dataset.from_dict({"text": ["x"]})},
            "'b': has no input_ids and no labels; it has",
        ),
        (Plain([{"input_ids": [1, 2], "labels": [1, -100]}]), "all 1 samples are masked"),
    ],
)
def test_what_is_refused(dataset: Any, text: str) -> None:
    with pytest.raises(UserError) as error:
        Pool.from_datasets(dataset)
    assert text in str(error.value)


@pytest.mark.parametrize(("named", "where"), [(False, "eval_dataset"), (True, "eval_dataset 'b'")])
def test_errors_name_the_argument_that_is_wrong(named: bool, where: str) -> None:
    masked = Plain([{"input_ids": [1, 2], "labels": [1, -100]}])
    with pytest.raises(UserError, match=f"^{where}: all 1 samples are masked: no label counts in the loss"):
        Pool.from_datasets({"b": masked} if named else masked, "eval_dataset")


def test_samples_without_a_label_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    Pool.from_datasets(Plain([*A, {"input_ids": [1, 2], "labels": [-100, -100]}]))
    assert "1 of 3 samples have no label that counts in the loss" in capsys.readouterr().err


def test_describe_sample_marks_what_is_trained() -> None:
    tokenizer = byte_tokenizer()
    prompt, answer = tokenizer("Was? ")["input_ids"], tokenizer("Größe</s>")["input_ids"]
    items = [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}]
    pool = Pool.from_datasets({"dom": Plain(items)})
    assert describe_sample(pool, 0, tokenizer) == (
        "sample 0 of dom: 13 tokens, 8 trained on (between ⟦ and ⟧)\nWas? ⟦Größe</s>⟧"
    )
    assert "Was? ⟦G ... 2 characters" in describe_sample(pool, 0, tokenizer, max_chars=14)
