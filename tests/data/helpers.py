"""Small rows, and what a loaded pool says."""

from __future__ import annotations

from dataflex.config import Config
from dataflex.data.load import LoadedData, load_data
from dataflex.data.pool import Pool
from tests.tiny import byte_tokenizer


def load(cfg: Config) -> LoadedData:
    return load_data(cfg, byte_tokenizer())


def numbered(count: int, tag: str = "") -> list[dict[str, str]]:
    """Alpaca rows whose answers are 0, 1, 2, ..., their questions the same with ``tag`` before it."""
    return [{"instruction": f"{tag}{i}", "output": f"{i}"} for i in range(count)]


def prompts(pool: Pool) -> list[str]:
    """The user's text of each sample in the template `default`."""
    texts = [byte_tokenizer().decode(pool[i]["input_ids"]) for i in range(len(pool))]
    return [text.removeprefix("Human: ").split("</s>")[0] for text in texts]
