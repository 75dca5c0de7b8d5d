"""Which files of a run folder go when a run starts over there, one by one."""

from __future__ import annotations

from dataflex.core.run_files import RUN_FILES, cleared

# What is the user's, or holds for any run of the same model and pool.
STAY = {
    "config.yaml",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "additional_chat_templates",
    "scores",
    "features",
    "embeddings",
    "cache",
}


def test_all_but_these_go_when_a_run_starts_over() -> None:
    assert {file.pattern for file in RUN_FILES if not file.cleared} == STAY
    assert set(cleared()) == {file.pattern.split("/")[0] for file in RUN_FILES} - STAY
