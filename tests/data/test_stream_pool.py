"""Streams as a pool: the samples of the memory-mapped pool, blocks across chunks, resume, memory, tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataflex.config import Config
from dataflex.config.schema import WeightingSection
from dataflex.data.pool import Pool, TrainingPool, describe_sample
from dataflex.data.streams.stream_pool import StreamPool
from dataflex.engine import checkpoint
from dataflex.engine.models.limits import check_limits
from dataflex.train.weighter.static_weights import static_weights
from dataflex.utils.errors import UserError
from tests.data.helpers import load, numbered
from tests.tiny import byte_tokenizer, tiny_llama

Add = Callable[..., Path]
MakeConfig = Callable[..., Config]


def open_streams(cfg: Config) -> StreamPool:
    pool = load(cfg).train
    assert isinstance(pool, StreamPool)
    return pool


def samples(pool: TrainingPool, ids: Any) -> list[str]:
    """The samples of ``ids`` as text, to compare."""
    made = [pool[i] for i in ids]
    return [json.dumps({key: np.asarray(value).tolist() for key, value in one.items()}) for one in made]


def domain(number: int, count: int, domains: int = 2) -> np.ndarray:
    """The first ``count`` ids of a domain."""
    return np.arange(count) * domains + number


@pytest.mark.parametrize("weights", [{}, {"role_weights": {"answer": 2.0}}])
def test_samples_are_those_of_the_memory_mapped_pool(add: Add, config: MakeConfig, weights: dict[str, Any]) -> None:
    add("a", numbered(9, "a" * 30))
    add("b", numbered(6, "b"))
    settings = {"weighting": WeightingSection(**weights)}
    mapped = load(config("a", "b", cutoff_len=24).model_copy(update=settings)).train
    pool = open_streams(config("a", "b", cutoff_len=24, streaming=True, buffer_size=4).model_copy(update=settings))
    assert isinstance(mapped, Pool) and mapped.weighs_tokens == pool.weighs_tokens == bool(weights)
    ids = np.concatenate([domain(0, 9), domain(1, 6)])
    assert sorted(samples(pool, ids)) == sorted(samples(mapped, range(15)))
    assert pool.domains_of(ids).tolist() == mapped.domain_ids.tolist()
    assert pool.domain_names == mapped.domain_names and pool.longest == 24
    assert describe_sample(pool, 24, byte_tokenizer()).startswith("sample 24 of a: 23 tokens")


@pytest.fixture
def text(add: Add) -> list[str]:
    documents = [chr(97 + i) * (3 * i % 11) + str(i) for i in range(13)]
    add("t", [{"text": one} for one in documents], columns={"prompt": "text"})
    add("u", [{"text": "u" * 50}], columns={"prompt": "text"})
    return documents


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cutoff=st.integers(1, 40), buffer=st.integers(1, 15))
def test_blocks_hold_every_document_once_a_pass_and_no_other_domain(
    text: list[str], config: MakeConfig, cutoff: int, buffer: int
) -> None:
    keys = {"stage": "pt", "cutoff_len": cutoff, "template": None, "streaming": True, "buffer_size": buffer}
    pool = open_streams(config("t", "u", **keys))
    tokens = sum(len(one) + 1 for one in text)
    blocks = -(-3 * tokens // cutoff) + 1
    ids = [token for i in domain(0, blocks) for token in pool[i]["input_ids"].tolist()]
    assert len(ids) == blocks * cutoff
    documents = byte_tokenizer().decode(ids).split("</s>")
    for number in range(3):
        assert sorted(documents[13 * number : 13 * (number + 1)]) == sorted(text)
    assert pool.sizes[0] in (tokens // cutoff, 0)
    assert set(byte_tokenizer().decode(pool[1]["input_ids"])) <= {"u", *"</s>"}


@pytest.mark.parametrize("keys", [{"dataset": ("a", "b")}, {"dataset": ("t", "u"), "stage": "pt", "template": None}])
def test_going_on_from_a_state_gives_the_same_samples(
    add: Add, text: list[str], config: MakeConfig, tmp_path: Path, keys: dict[str, Any]
) -> None:
    """At every third sample the state goes through a checkpoint's file into a fresh pool."""
    add("a", numbered(11, "a"))
    add("b", numbered(5, "b"))
    cfg = config(**keys, streaming=True, buffer_size=3, cutoff_len=16)
    pool, ids = open_streams(cfg), np.arange(2 * 30)
    made = samples(pool, ids)
    assert pool.sizes.all(), "the states are of more than one pass"
    again = open_streams(cfg)
    for place in range(0, len(ids), 3):
        file = tmp_path / "state.pt"
        torch.save(checkpoint.encode(again.state_dict()), file)
        fresh = open_streams(cfg)
        fresh.load_state_dict(checkpoint.decode(torch.load(file, weights_only=True)))
        assert fresh.sizes.tolist() == again.sizes.tolist(), "how long a pass is, where one has ended"
        assert samples(fresh, ids[place : place + 9]) == made[place : place + 9]
        assert fresh.fingerprint == pool.fingerprint
        samples(again, ids[place : place + 3])


def test_only_one_chunk_of_each_domain_is_held(add: Add, text: list[str], config: MakeConfig) -> None:
    add("a", numbered(50))
    add("b", numbered(40))
    pool = open_streams(config("a", "b", streaming=True, buffer_size=7))
    packed = open_streams(config("t", "u", stage="pt", template=None, streaming=True, buffer_size=5, cutoff_len=8))
    for index in range(200):
        pool[index], packed[index]
        assert all(len(stream._rows) <= 7 for stream in pool.streams)
        assert all(len(stream._rows) <= 5 for stream in packed.streams)
        assert all(8 * len(stream._blocks) <= 5 * 51 + 8 for stream in packed.streams)  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="position 3 is behind the chunk"):
        pool[6]


def test_reaching_loads_what_other_ranks_read_and_no_more(add: Add, config: MakeConfig) -> None:
    add("a", numbered(20))
    add("b", numbered(20))
    cfg = config("a", "b", streaming=True, buffer_size=4)
    one, two = open_streams(cfg), open_streams(cfg)
    ids = np.array([0, 2, 4, 1, 6, 8])  # of domain 0 positions 0 to 4, of domain 1 position 0
    for pool, mine in ((one, ids[:3]), (two, ids[3:])):
        samples(pool, mine)
        pool.reach(ids)
    assert [stream.start for stream in one.streams] == [4, 0]
    assert checkpoint.encode(one.state_dict()) == checkpoint.encode(two.state_dict())
    assert samples(one, [10]) == samples(two, [10])


def test_tokens_are_those_of_the_batch(add: Add, config: MakeConfig) -> None:
    add("a", numbered(20, "a"))
    add("b", numbered(20, "long " * 5))
    pool = open_streams(config("a", "b", streaming=True))
    ids = [[0, 2, 1], [3]]
    lengths = [[len(pool[i]["input_ids"]) for i in part] for part in ids]
    micro = [SimpleNamespace(sample_ids=np.array(part), labels=torch.zeros(1)) for part in ids]
    tokens = pool.tokens_of(SimpleNamespace(micro_batches=micro))
    assert tokens.tolist() == [sum(lengths[0][:2]), lengths[0][2] + lengths[1][0]]


def test_a_sample_is_named_by_its_row_until_its_step_is_over(add: Add, text: list[str], config: MakeConfig) -> None:
    """What a loss that is not finite is told with: the rank that read it knows the row, the others the dataset."""
    add("a", numbered(20, "a"))
    pool = open_streams(config("a", streaming=True, buffer_size=8))
    assert pool.whence(9) == "'a'"
    answers = [byte_tokenizer().decode(pool[i]["input_ids"]).split("Assistant:")[1] for i in range(10)]
    assert sorted(answers) != answers, "the chunk is shuffled"
    assert [pool.whence(i) for i in range(10)] == [f"a.json:{int(text.split('<')[0]) + 1}" for text in answers]
    micro = SimpleNamespace(sample_ids=np.arange(10), labels=torch.zeros(1))
    pool.tokens_of(SimpleNamespace(micro_batches=[micro]))
    assert pool.whence(9) == "'a'"
    blocks = open_streams(config("t", stage="pt", template=None, streaming=True, cutoff_len=16))
    assert len(blocks[0]["input_ids"]) == 16 and blocks.whence(0) == "'t'"


@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_a_token_id_that_the_model_does_not_have_is_told_with_its_row(add: Add, config: MakeConfig, stage: str) -> None:
    """Of a stream it is seen where the sample is read; \\x7f is id 224, and no other character here is above 223."""
    rows = [{"text": "na" + "\x7f" * (i == 5), "output": "b"} for i in range(8)]
    add("a", rows, columns={"prompt": "text", "response": "output"})
    keys = {"stage": "pt", "template": None} if stage == "pt" else {}
    for rows_of_model, told in ((224, True), (225, False)):
        pool = open_streams(config("a", **keys, streaming=True, buffer_size=4, cutoff_len=64))
        check_limits(tiny_llama(rows_of_model), {"dataset": pool, "eval_dataset": None}, "", False)
        if not told:
            assert len(samples(pool, range(8))) == 8
            continue
        where = "'a'" if stage == "pt" else "a.json:6"
        words = rf"^dataset: sample \d \({where}\): input_ids has the token id 224, the model's vocabulary has ids 0 to"
        with pytest.raises(UserError, match=words + " 223; the data must be made with the tokenizer of this model$"):
            samples(pool, range(8))


def test_domain_weights_multiply_the_losses_of_streams(add: Add, config: MakeConfig) -> None:
    add("a", numbered(5))
    add("b", numbered(5))
    pool = open_streams(config("a", "b", streaming=True))
    weights = static_weights(WeightingSection(domain_weights={"b": 3.0}), pool, None, 9, torch.device("cpu"))
    found = weights.of(pool.weight_rows(np.array([7, 2, 1])), np.ones(3), pool.size)
    assert weights.any and found is not None and found.tolist() == [3.0, 1.0, 3.0]


def test_max_samples_takes_the_first_rows_and_num_samples_is_refused(add: Add, config: MakeConfig) -> None:
    add("a", numbered(20))
    pool = open_streams(config("a", streaming=True, max_samples=6, buffer_size=4))
    mapped = load(config("a", max_samples=6)).train
    assert sorted(samples(pool, range(6))) == sorted(samples(mapped, range(6))) == sorted(samples(pool, range(6, 12)))
    add("holes", [{"instruction": "q", "output": None}, *numbered(6)])
    kept = open_streams(config("holes", streaming=True, max_samples=5, buffer_size=4))
    assert sorted(samples(kept, range(5))) == sorted(samples(mapped, range(5))), "a row that is dropped is no sample"
    add("b", numbered(20), num_samples=5)
    with pytest.raises(UserError, match="b.num_samples: streaming: true cannot draw among rows that it does not know"):
        open_streams(config("b", streaming=True))
    with pytest.raises(UserError, match=r"dataset: 'c' is not in .*dataset_info.json"):
        open_streams(config("c", streaming=True))


def test_the_fingerprint_is_of_data_and_settings(add: Add, config: MakeConfig) -> None:
    def fingerprint(**keys: Any) -> str:
        return open_streams(config("a", **{"streaming": True, **keys})).fingerprint

    add("a", numbered(9))
    first = fingerprint()
    others = [fingerprint(cutoff_len=9), fingerprint(buffer_size=3), fingerprint(max_samples=3)]
    add("a", numbered(8))
    assert len({first, *others, fingerprint()}) == 5
    add("a", numbered(9))
    assert fingerprint() == first


def test_evaluation_data_stays_mapped_and_streams_are_described(add: Add, config: MakeConfig) -> None:
    add("a", numbered(9))
    add("c", numbered(4))
    out = load(config("a", streaming=True, buffer_size=3, eval_dataset=("c",)))
    assert out.eval is not None and len(out.eval) == 4
    first, *rest = out.report.lines()
    assert first == "a: streamed (a.json, 333 B), shuffled 3 rows at a time" and rest[0].startswith("evaluation: c: 4")
