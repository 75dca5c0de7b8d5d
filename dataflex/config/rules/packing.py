"""Rows of several samples in stage sft: `packing`, `neat_packing`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataflex.config.schema import Config


def shares_rows(cfg: Config) -> bool:
    """Whether a row of a batch holds several samples; the blocks of stage pt are made where it is tokenised."""
    return cfg.packs and cfg.method.stage == "sft"


def problems(cfg: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys, text) of what packs cannot be used with; the first key is where it is reported."""
    if shares_rows(cfg) and cfg.data.streaming:
        text = (
            "packs are filled by the lengths of samples to come, which streaming: true does not know; drop one of both"
        )
        yield ("packing" if cfg.data.packing else "neat_packing", "streaming", "stage"), text


def notes(cfg: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys, text) of what should be said of packs."""
    if not shares_rows(cfg):
        return
    if not cfg.data.neat_packing:
        text = "the samples of a row do not see one another, as with neat_packing; in LLaMA-Factory without it they do"
        yield ("packing",), text
    if cfg.train.group_by_length:
        yield ("group_by_length",), "not used: packs are all about as long"
