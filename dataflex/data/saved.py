"""`tokenized_path`: tokenised datasets kept in a folder of the user's, one sub-folder per dataset."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex.utils.dist import is_main
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

if TYPE_CHECKING:
    from datasets import Dataset

MANIFEST = "dataflex_tokenized.json"


def load_or_make(
    folder: Path,
    name: str,
    fingerprint: str,
    made_from: dict[str, str],
    make: Callable[[], Dataset],
    overwrite: bool,
) -> Dataset:
    """What is saved under folder/name if it was made from the same data in the same way, else ``make()``.

    ``made_from`` names the parts of the fingerprint, so that a mismatch can say which of them changed.
    A mismatch is a UserError unless ``overwrite``; with it, rank 0 makes and saves anew.
    """
    from datasets import Dataset

    target = folder / name.replace(os.sep, "_")
    manifest = target / MANIFEST
    if manifest.is_file() and not (overwrite and is_main()):
        saved = json.loads(manifest.read_text())
        if saved.get("fingerprint") == fingerprint:
            return Dataset.load_from_disk(str(target))
        changed = [key for key, value in made_from.items() if saved.get("made_from", {}).get(key) != value]
        raise UserError(
            f"tokenized_path: {target} was made otherwise (changed: {', '.join(changed) or 'the format'}); "
            "name another folder, or set overwrite_cache: true to make it anew"
        )
    if target.exists() and not manifest.is_file():
        raise UserError(f"tokenized_path: {target} exists but holds no {MANIFEST}; name another folder")
    return _save(make(), target, {"fingerprint": fingerprint, "made_from": made_from})


def _save(dataset: Dataset, target: Path, manifest: dict[str, object]) -> Dataset:
    from datasets import Dataset

    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    dataset.save_to_disk(str(partial))
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    logger.info(f"tokenized_path: saved {target}")
    return Dataset.load_from_disk(str(target))
