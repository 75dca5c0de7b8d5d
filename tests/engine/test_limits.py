"""A model's positions and vocabulary against the data: told in one line before training."""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset

from dataflex.data.pool import Pool
from dataflex.engine.models.limits import check_limits
from dataflex.scoring.checks.model_check import refusal
from dataflex.utils.errors import UserError
from tests import families
from tests.tiny import tiny_llama
from tests.tiny_engine import samples

POSITIONS = 16
SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT: dict[str, Any] = {"vocab_size": 259, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}
# Name of the table in the message; None: there is none, so that longer samples are right.
TABLES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "gpt2": ("GPT2Config", GPT, "transformer.wpe"),
    "gptj": ("GPTJConfig", GPT | {"rotary_dim": 4}, "transformer.h.0.attn.embed_positions"),
    "opt": ("OPTConfig", SIZES | {"ffn_dim": 24}, "model.decoder.embed_positions"),
    "biogpt": ("BioGptConfig", SIZES, "biogpt.embed_positions"),
    "xglm": ("XGLMConfig", SIZES | {"d_model": 16, "num_layers": 1, "attention_heads": 2, "ffn_dim": 24}, None),
}


def long_pool() -> Pool:
    """Of two domains; sample 5 of the second is one token too long."""
    made = samples(8, seed=1, shortest=4, longest=POSITIONS)
    other = samples(8, seed=2, shortest=4, longest=POSITIONS - 1)
    ids = list(range(3, 3 + POSITIONS + 1))
    other[5] = {"input_ids": ids, "labels": ids}
    return Pool.from_datasets({"left": made, "right": other})


def model(name: str, settings: dict[str, Any]) -> Any:
    config = getattr(transformers, name)(**settings)
    config.use_cache = False
    return transformers.AutoModelForCausalLM.from_config(config)


def forward(net: Any, tokens: int) -> None:
    ids = torch.arange(3, 3 + tokens)[None]
    with torch.no_grad():
        net.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("family", TABLES)
def test_a_table_of_positions_is_named_where_the_model_would_fail(family: str) -> None:
    name, settings, table = TABLES[family]
    net = model(name, settings)
    forward(net, POSITIONS)
    ids = list(range(3, 3 + POSITIONS))
    check_limits(net, {"dataset": Pool.from_datasets([{"input_ids": ids, "labels": ids}])}, "", False)
    if table is None:
        forward(net, POSITIONS + 1)
        check_limits(net, {"dataset": long_pool()}, "set cutoff_len:", False)
        return
    with pytest.raises((IndexError, RuntimeError)):
        forward(net, POSITIONS + 1)
    with pytest.raises(UserError) as error:
        check_limits(net, {"train_dataset": None, "dataset": long_pool()}, "set cutoff_len:", True)
    assert str(error.value) == (
        "dataset: sample 13 ('right' at 5) has 17 tokens, the model has 16 positions (max_position_embeddings, the "
        f"rows of {table}) and no more; set cutoff_len: 16"
    )


ALIBI: dict[str, dict[str, Any]] = {
    "MptConfig": {"vocab_size": 259, "d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": POSITIONS},
    "BloomConfig": {"vocab_size": 259, "hidden_size": 16, "n_head": 2, "n_layer": 1, "max_seq_len": POSITIONS},
}


@pytest.mark.parametrize("name", ALIBI)
def test_biases_that_end_are_told_from_those_that_go_on(name: str) -> None:
    """Both configs name a length, neither model has a table or rotary positions; MPT's biases are of that length."""
    net = model(name, ALIBI[name])
    forward(net, POSITIONS)
    engine = SimpleNamespace(module=net.train(), device="cpu", empty_partition_cache=lambda: None)
    check = partial(check_limits, net, {"dataset": long_pool()}, "set cutoff_len:", True, partial(refusal, engine))
    if name == "BloomConfig":
        forward(net, POSITIONS + 1)
        check()
    else:
        with pytest.raises(RuntimeError):
            forward(net, POSITIONS + 1)
        with pytest.raises(
            UserError,
            match=r"^dataset: sample 13 \('right' at 5\) has 17 tokens, the model has 16 "
            r"positions \(max_seq_len\) and cannot be run on 17 tokens \(.*\); set cutoff_len: 16$",
        ):
            check()
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("family", families.FAMILIES)
def test_nothing_is_said_of_data_that_fits(family: str, caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool.from_datasets([{"input_ids": list(range(96)), "labels": list(range(96))}])
    with caplog.at_level(logging.WARNING):
        check_limits(families.model(family), {"train_dataset": pool}, "", False)
    assert not [record for record in caplog.records if record.name.startswith("dataflex")]


@pytest.mark.parametrize(
    ("rope", "scratch", "said"),
    [("default", False, True), ("default", True, False), ("dynamic", False, False)],
)
def test_untrained_rotary_positions_are_said(
    rope: str, scratch: bool, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    parameters = {"rope_type": rope, "rope_theta": 1e4} | ({"factor": 2.0} if rope == "dynamic" else {})
    net = tiny_llama(max_position_embeddings=POSITIONS, rope_parameters=parameters)
    with caplog.at_level(logging.WARNING):
        check_limits(net, {"eval_dataset": long_pool()}, "set cutoff_len:", scratch)
    lines = [record.getMessage() for record in caplog.records if "positions" in record.getMessage()]
    assert len(lines) == said
    if said:
        assert lines[0] == (
            "eval_dataset: sample 13 ('right' at 5) has 17 tokens, the model has 16 positions in its training "
            "(max_position_embeddings); rotary ones beyond them work, but nothing was trained there: "
            "set cutoff_len: 16"
        )


@pytest.mark.parametrize("column", ["input_ids", "labels"])
@pytest.mark.parametrize("wrong", [259, -1, 2**40])
@pytest.mark.parametrize("arrow", [False, True])
def test_a_token_id_outside_the_vocabulary_names_its_sample(column: str, wrong: int, arrow: bool) -> None:
    made = samples(6, seed=1)
    made[4][column] = [*made[4][column][:-1], wrong]
    data = Dataset.from_list(made) if arrow else made
    pool = Pool.from_datasets(data) if not arrow else Pool(data, [0] * 6, ["a"], [len(s["labels"]) for s in made], "f")
    with pytest.raises(UserError) as error:
        check_limits(tiny_llama(), {"train_dataset": pool}, "", False)
    whence = "'a'" if arrow else "'train' at 4"
    assert str(error.value) == (
        f"train_dataset: sample 4 ({whence}): {column} has the token id {wrong}, the model's "
        "vocabulary has ids 0 to 258; the data must be made with the tokenizer of this model"
    )
    check_limits(tiny_llama(), {"train_dataset": Pool.from_datasets(samples(6, seed=1))}, "", False)


def test_a_model_that_says_nothing_limits_nothing() -> None:
    check_limits(torch.nn.Linear(2, 2), {"train_dataset": long_pool()}, "", False)


def test_a_model_that_cannot_name_its_embeddings_still_has_its_positions_compared() -> None:
    class Own(transformers.GPT2PreTrainedModel):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.words, self.places = torch.nn.Embedding(259, 16), torch.nn.Embedding(POSITIONS, 16)

    net = Own(transformers.GPT2Config(**GPT))
    with pytest.raises(NotImplementedError):
        net.get_input_embeddings()
    with pytest.raises(UserError, match="17 tokens, the model has 16 positions .*the rows of places. and"):
        check_limits(net, {"train_dataset": long_pool()}, "cut the samples to", False)
