"""Checkpoints that count only when whole.

A checkpoint is a folder with DeepSpeed's files, ``dataflex_state.pt`` (steps, plan, hooks; rank-identical),
``dataflex_random_rank<r>.pt`` and, written last, ``dataflex_manifest.json`` with every file's size and sha256, and its
own. The pointer ``latest`` beside it is renamed into place after that. A folder without a matching manifest is a broken
checkpoint and is passed over with a warning.
"""

from __future__ import annotations

from dataflex.engine.checkpoint.deepspeed_files import deepspeed_globals, load_plain
from dataflex.engine.checkpoint.loading import check_start, load, load_weights
from dataflex.engine.checkpoint.manifest import (
    MANIFEST,
    POINTER,
    STATE,
    Manifest,
    broken,
    is_plain,
    latest,
    newest_whole,
    newest_whole_here,
    pointed_to,
    read_manifest,
    saved_step,
    step_of,
    unfinished,
)
from dataflex.engine.checkpoint.saving import save
from dataflex.engine.checkpoint.split import Split
from dataflex.engine.checkpoint.state import decode, encode, identity

__all__ = [
    "MANIFEST",
    "POINTER",
    "STATE",
    "Manifest",
    "Split",
    "broken",
    "check_start",
    "decode",
    "deepspeed_globals",
    "encode",
    "identity",
    "is_plain",
    "latest",
    "load",
    "load_plain",
    "load_weights",
    "newest_whole",
    "newest_whole_here",
    "pointed_to",
    "read_manifest",
    "save",
    "saved_step",
    "step_of",
    "unfinished",
]
