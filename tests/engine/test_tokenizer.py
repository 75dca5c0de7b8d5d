"""The tokenizer of a run: what the source has stays where new tokens come to it."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from dataflex.config import Config
from dataflex.config.schema import ModelSection
from dataflex.engine.models.model import load_tokenizer, read_tokenizer
from tests.tiny import byte_tokenizer


def test_new_special_tokens_come_to_those_of_the_source(tmp_path: Path) -> None:
    source = byte_tokenizer()
    source.add_special_tokens({"additional_special_tokens": ["<repo>", "<file>"]})
    source.save_pretrained(tmp_path / "source")
    cfg = Config(model=ModelSection(model_name_or_path=str(tmp_path / "source"), new_special_tokens=("<tool>",)))
    before = read_tokenizer(cfg)
    made = load_tokenizer(cfg)
    assert set(made.all_special_tokens) == {*before.all_special_tokens, "<tool>"} >= {"<repo>", "<file>"}
    for token in ("<repo>", "<file>"):
        assert made.convert_tokens_to_ids(token) == before.convert_tokens_to_ids(token)
    assert made.convert_tokens_to_ids("<tool>") == len(before)
    made.save_pretrained(tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert set(again.all_special_tokens) == set(made.all_special_tokens)
    ids = again("a<repo>b<tool>")["input_ids"]
    assert again.decode(ids, skip_special_tokens=True) == "ab"
