"""What a model's own config limits, compared with the data before training: its positions and its vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import nn

from dataflex.data.pool import Pool, TrainingPool, check_ids
from dataflex.data.streams.stream_pool import StreamPool
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

# What configs call the tokens that a model is made for; MPT has the second name, decoders of speech the third.
_NAMES = ("max_position_embeddings", "max_seq_len", "max_target_positions")
# Tables of positions may have a few rows in front that no token gets (OPT, BART).
_SPARE_ROWS = 8


def check_limits(
    module: nn.Module,
    pools: Mapping[str, TrainingPool | None],
    advice: str,
    scratch: bool,
    refuses: Callable[[int], str | None] = lambda tokens: None,
) -> None:
    """UserError for a token id that the model has no row for, or a sample longer than the model can be run on.

    Says once where samples reach rotary positions that the model was not trained for. pools: by the key that names
    them. advice: how samples are made shorter. scratch: the weights are random, so that no position is trained.
    refuses: why the model cannot be run on so many tokens, or None; asked where samples are longer than the config
    says, and neither a table nor rotary positions tell what follows (MPT's biases end there, BLOOM's do not).
    """
    given = {key: pool for key, pool in pools.items() if pool is not None}
    rows = vocabulary(module)
    for key, pool in given.items():
        if rows is not None and isinstance(pool, Pool):
            _check_ids(key, pool, rows)
        elif isinstance(pool, StreamPool):
            pool.vocabulary = rows  # its samples are checked as they are read
    name, limit = _positions(module)
    for key, pool in given.items():
        if limit is None or pool.longest <= limit:
            continue
        table = _table_of_positions(module, limit)
        longest = f"{key}: {_longest(pool)}, the model has {limit:,} positions"
        if table is not None:
            raise UserError(f"{longest} ({name}, the rows of {table}) and no more; {advice} {limit}")
        if _rotary(module):
            if not scratch:
                logger.warning(
                    f"{longest} in its training ({name}); rotary ones beyond them work, but nothing was "
                    f"trained there: {advice} {limit}"
                )
        elif why := refuses(limit + 1):
            raise UserError(f"{longest} ({name}) and cannot be run on {limit + 1:,} tokens ({why}); {advice} {limit}")


def vocabulary(module: nn.Module) -> int | None:
    """How many token ids the model knows: the rows of its input embeddings; None where it does not say."""
    found = [m.num_embeddings for m in _input_embeddings(module) if isinstance(m, nn.Embedding)]
    return found[0] if found else getattr(getattr(module, "config", None), "vocab_size", None)


def _input_embeddings(module: nn.Module) -> list[nn.Module]:
    """The module of the input embeddings and those in it; none where the model does not say which it is."""
    find = getattr(module, "get_input_embeddings", None)
    try:
        table = find() if find is not None else None
    except NotImplementedError:  # a model of the user's own, derived from transformers' base
        table = None
    return [] if table is None else list(table.modules())


def _check_ids(key: str, pool: Pool, rows: int) -> None:
    low, high = pool.id_bounds
    if low >= 0 and high < rows:
        return
    for index in range(len(pool)):
        check_ids(pool[index], rows, f"{key}: sample {index} ({pool.whence(index)})")


def _text_config(module: nn.Module) -> Any:
    config: Any = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _positions(module: nn.Module) -> tuple[str, int | None]:
    """The tokens that the model is made for, and what its config calls them; None where it does not say."""
    config = _text_config(module)
    for name in _NAMES:
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return name, limit
    return "", None


def _table_of_positions(module: nn.Module, limit: int) -> str | None:
    """The name of a learned or stored table with a row for each position; of one that grows when needed: None."""
    words = _input_embeddings(module)
    for name, part in module.named_modules():
        if hasattr(part, "make_weights"):
            continue
        tables = {
            f"{name}.{key}": value.shape[0] for key, value in part.named_buffers(recurse=False) if value.dim() > 1
        }
        if isinstance(part, nn.Embedding) and not any(part is word for word in words):
            tables[name] = part.num_embeddings
        for found, rows in tables.items():
            if limit <= rows <= limit + _SPARE_ROWS:
                return found
    return None


def _rotary(module: nn.Module) -> bool:
    """Whether positions are rotary, of a kind that does not stretch itself with the text's length."""
    kinds = list(_kinds(getattr(_text_config(module), "rope_parameters", None) or {}))
    return bool(kinds) and "dynamic" not in kinds


def _kinds(parameters: Mapping[str, Any]) -> Iterator[str]:
    """The rope_type of each kind of layer."""
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            yield from _kinds(value)
        elif key == "rope_type":
            yield str(value)


def _longest(pool: TrainingPool) -> str:
    """The longest sample in words, or how long samples of a stream may be."""
    if not isinstance(pool, Pool):
        return f"samples of up to cutoff_len {pool.longest:,} tokens"
    index = int(np.argmax(pool.lengths))
    return f"sample {index} ({pool.whence(index)}) has {pool.longest:,} tokens"
