"""The packaged tiny Llama: its files are what the code writes, and they load without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from dataflex.config.paths import packaged_folder
from dataflex.demo import byte_tokenizer

MODEL = packaged_folder() / "models" / "tiny_llama"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL)


def test_committed_files_are_what_the_code_writes(tmp_path: Path) -> None:
    byte_tokenizer.write(tmp_path)

    def read(folder: Path, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
        return content

    assert read(tmp_path, "tokenizer.json") == read(MODEL, "tokenizer.json")
    keys = ("bos_token", "eos_token", "pad_token", "chat_template", "model_max_length")
    new, committed = read(tmp_path, "tokenizer_config.json"), read(MODEL, "tokenizer_config.json")
    assert {key: new[key] for key in keys} == {key: committed[key] for key in keys}


@pytest.mark.parametrize(
    "text",
    ["3 + 4 = 7 apples", " two  spaces\n\ttab ", "naïve café – 日本語 🎈", "don't , . ! ?", "\x00\x7f", ""],
)
def test_decode_undoes_encode(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_chat_template_renders_a_prefix_before_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    question, answer = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([question, answer], tokenize=False)
    assert whole == prompt + "2</s>"


def test_model_is_small_and_fits_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    config = AutoConfig.from_pretrained(MODEL)
    assert len(tokenizer) == config.vocab_size == byte_tokenizer.VOCAB_SIZE
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert 300_000 <= parameters <= 1_000_000
