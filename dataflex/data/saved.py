"""`tokenized_path`: tokenised datasets kept in a folder of the user's, one sub-folder per dataset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex.data.cache import MANIFEST, Make, opened, read_entry, store
from dataflex.utils.dist import is_main
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger
from dataflex.utils.records import DamagedError

if TYPE_CHECKING:
    from datasets import Dataset


def load_or_make(
    folder: Path,
    name: str,
    fingerprint: str,
    made_from: dict[str, str],
    make: Make,
    overwrite: bool,
) -> Dataset:
    """What is saved under folder/name if it was made from the same data in the same way, else what ``make`` makes.

    ``made_from`` names the parts of the fingerprint, so that a mismatch can say which of them changed.
    A mismatch, and what is not as it was saved, are UserErrors unless ``overwrite``; with it, rank 0 makes and saves
    anew.
    """
    target = folder / name.replace(os.sep, "_")
    try:
        if (target / MANIFEST).is_file() and not (overwrite and is_main()):
            return _load(target, fingerprint, made_from)
        if target.exists() and not (target / MANIFEST).is_file():
            raise UserError(f"tokenized_path: {target} exists but holds no {MANIFEST}; name another folder")
        dataset = store(target, make, fingerprint, made_from)
    except OSError as error:
        raise UserError(f"tokenized_path: {target} cannot be written: {error.strerror or error}") from None
    logger.info(f"tokenized_path: saved {target}")
    return dataset


def _load(target: Path, fingerprint: str, made_from: dict[str, str]) -> Dataset:
    try:
        entry = read_entry(target)
        if entry.fingerprint == fingerprint:
            return opened(target, entry)
    except DamagedError as problem:
        raise UserError(
            f"tokenized_path: {target} is damaged: {problem}; set overwrite_cache: true to make it anew"
        ) from None
    changed = [key for key, value in made_from.items() if entry.made_from.get(key) != value]
    raise UserError(
        f"tokenized_path: {target} was made otherwise (changed: {', '.join(changed) or 'the format'}); "
        "name another folder, or set overwrite_cache: true to make it anew"
    )
