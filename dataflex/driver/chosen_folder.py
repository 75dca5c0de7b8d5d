"""The folder that `dataflex-cli select` writes: a dataset_dir of its own, which can be moved.

`<dataset>.jsonl`, best rows first, of every dataset that was chosen from, one without picks too; `eval/`, copies of
the datasets to evaluate on and those of a held-out part; scores.parquet, who was picked; `CHOSEN`; and, last,
dataset_info.json.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.config import Config
from dataflex.data.chosen import CHOSEN, Chosen
from dataflex.data.sources.info import INFO_FILE, DatasetInfo, read_dataset_infos, read_entries
from dataflex.data.sources.read import list_files
from dataflex.data.sources.rows import entry_for, rows_in_files
from dataflex.driver.scores import TABLE, Places
from dataflex.report.decision_table import SCORE, Column, picked_column, score_columns, write_table
from dataflex.utils.errors import UserError
from dataflex.utils.files import remove, write_atomically
from dataflex.utils.logging import logger
from dataflex.utils.records import write_sealed

EVAL = "eval"


@dataclass(frozen=True)
class Picked:
    """What was decided. picks: int64 [k], sample ids, best first, repeated where a sample was taken more than once.

    scored: {column: [n]} of all samples; score: what the picks were taken for or ranked by.
    """

    infos: list[DatasetInfo]
    places: Places
    picks: NDArray[np.int64]
    scored: dict[str, NDArray[Any]]
    replacement: bool = False

    def of_domain(self, domain: int) -> NDArray[np.int64]:
        return self.picks[self.places.domains[self.picks] == domain]


def write_folder(
    folder: Path, cfg: Config, dataset_dir: Path, picked: Picked, held_out: Places | None, chosen: Chosen
) -> None:
    """Write the folder; without a dataset_info.json until all is there. ``chosen`` gets the names of what is held out.

    UserError where it holds other data, or the samples are not rows.
    """
    if (picked.places.rows < 0).any():
        raise UserError("select: packed blocks are not made from one row each; score with packing: false")
    if folder.resolve() == dataset_dir.resolve():
        raise UserError(f"select_dir: {folder} is dataset_dir, whose data it would write over")
    if (folder / INFO_FILE).exists() and not (folder / CHOSEN).exists():
        raise UserError(f"select_dir: {folder} has a {INFO_FILE} that is not of a selection; name another folder")
    (folder / INFO_FILE).unlink(missing_ok=True)
    entries: dict[str, Any] = {}
    for domain, info in enumerate(picked.infos):
        mine = picked.of_domain(domain)
        score = picked.scored[SCORE]
        more = [{"dataflex_id": int(place), "dataflex_score": float(score[place])} for place in mine]
        file_name = _own(f"{info.name}.jsonl")
        _write_rows(folder / file_name, info, _part(picked.places, mine), more)
        entries[info.name] = entry_for(info, dataset_dir, file_name) | ({} if len(mine) else {"num_samples": 0})
    entries |= _carried(cfg, dataset_dir, folder, entries)
    of_held_out = {} if held_out is None else _held_out(picked.infos, dataset_dir, folder, held_out, entries)
    entries |= of_held_out
    _write_table(folder, picked)
    names = [*chosen.held_out, *of_held_out]
    write_sealed(folder / CHOSEN, chosen.model_copy(update={"held_out": names}).model_dump())
    write_atomically(folder / INFO_FILE, json.dumps(entries, indent=1, ensure_ascii=False))


def _own(name: str) -> str:
    """A file's or folder's name out of a dataset's."""
    return name.replace(os.sep, "_").lstrip(".") or "_"


def _part(places: Places, ids: NDArray[np.int64]) -> Places:
    return Places(places.domains[ids], places.files[ids], places.rows[ids])


def _write_rows(path: Path, info: DatasetInfo, places: Places, more: Sequence[dict[str, Any]] = ()) -> None:
    """The raw rows of one dataset as .jsonl, in this order. more: further columns of each."""
    where = list(zip(places.files.tolist(), places.rows.tolist(), strict=True))
    rows = rows_in_files(info, where) if where else {}
    with_more = zip(where, more or [{}] * len(where), strict=True)
    lines = [json.dumps({**rows[place], **own}, ensure_ascii=False, default=str) + "\n" for place, own in with_more]
    write_atomically(path, "".join(lines))


def _carried(cfg: Config, dataset_dir: Path, folder: Path, taken: Iterable[str]) -> dict[str, Any]:
    """Entries of the datasets that are evaluated on, their files copied; those of the hub stay where they are."""
    entries, carried = read_entries(dataset_dir / INFO_FILE), dict[str, Any]()
    for key, names in (("eval_dataset", cfg.data.eval_dataset), ("mixer_eval_dataset", cfg.flex.mixer_eval_dataset)):
        for info in read_dataset_infos(names, dataset_dir, key):
            if info.name in taken:
                logger.warning(
                    f"{key}: '{info.name}' is chosen from too, so in {folder} it is its chosen rows; give the whole of "
                    "it another name to evaluate on that"
                )
            elif info.name not in carried:
                carried[info.name] = dict(entries[info.name])
                if info.path is not None:
                    carried[info.name]["file_name"] = _copied(info.path, folder, _own(info.name))
    return carried


def _copied(path: Path, folder: Path, name: str) -> str:
    """Copy a dataset's file, or its folder's files; the path within ``folder``."""
    (folder / EVAL).mkdir(parents=True, exist_ok=True)
    if path.is_file():
        name += path.suffix
    temporary, target = folder / EVAL / f".{name}.tmp", folder / EVAL / name
    remove(temporary)
    if path.is_file():
        shutil.copyfile(path, temporary)
    else:
        temporary.mkdir()
        for file in list_files(path, say=False):
            shutil.copyfile(file, temporary / file.name)
    remove(target)
    os.replace(temporary, target)
    return f"{EVAL}/{name}"


def _held_out(
    infos: list[DatasetInfo], dataset_dir: Path, folder: Path, places: Places, taken: Iterable[str]
) -> dict[str, Any]:
    """Entries of the rows that val_size held out of each dataset."""
    found: dict[str, Any] = {}
    for domain, info in enumerate(infos):
        mine = np.flatnonzero(places.domains == domain)
        if not len(mine):
            continue
        name = f"{info.name}_held_out"
        while name in taken:
            name += "_"
        file_name = f"{EVAL}/{_own(name)}.jsonl"
        _write_rows(folder / file_name, info, _part(places, mine))
        found[name] = entry_for(info, dataset_dir, file_name)
    return found


def _write_table(folder: Path, picked: Picked) -> None:
    """Every sample: where it was read, its scores, its rank and whether it was picked."""
    places, size = picked.places, len(picked.places.rows)
    names = np.array([info.name for info in picked.infos], dtype=object)
    columns = [
        Column("sample_id", "int64", lambda part: np.arange(part.start, part.stop)),
        Column("dataset", "string", lambda part: names[places.domains[part]]),
        Column("file", "string", lambda part: places.files[part]),
        Column("row", "int64", lambda part: places.rows[part]),
        *score_columns(picked.scored, size, "select"),
        picked_column(picked.picks, size, picked.replacement),
    ]
    write_table(folder / TABLE, columns, size)
