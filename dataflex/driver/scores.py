"""The files of `dataflex-cli score`: scores.parquet, a row for each sample, and scores.json: what they are of.

Where val_size held a part of the data out, held_out.parquet names its rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import __version__
from dataflex.data.chosen import Cost
from dataflex.data.pool import Pool
from dataflex.report.decision_table import SCORE, pool_columns, read_columns, score_columns, write_table
from dataflex.utils.errors import UserError, cut
from dataflex.utils.records import DamagedError, FileRecord, Record, read_sealed, write_sealed

if TYPE_CHECKING:
    import pandas as pd

FACTS, TABLE, HELD_OUT = "scores.json", "scores.parquet", "held_out.parquet"
OLD = "scores.npy"
DRAW = "draw"
PLACE = ("sample_id", "dataset", "file", "row")


class Facts(Record):
    """What was scored, with which weights, and what that took.

    pool: its fingerprint. domains: names, in the order of the ids. contents: of each domain's raw data. step,
    learning_rate: of the checkpoint, where there was one; the rate is the mean since the checkpoint before it.
    subtasks: of the target, where there is a score for each (in `column_of` it); where these are its single samples,
    tasks: the subtasks that they are of, and task_of: which, for each. aggregate: the rule that the component takes by;
    `DRAW`: by a draw, of which replacement says whether it takes a sample twice. order: of the subtasks in a round
    robin, where it is the component's own. vote_share: its share of the pool that a subtask votes for. features: the
    store of the samples' features or embeddings, where they were kept. table, held_out: the files as they were written;
    beside: those of `dataflex-cli embed`, by name. dataflex: the version.
    """

    pool: str
    domains: list[str]
    contents: list[str]
    component: str
    checkpoint: str | None
    step: int
    learning_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    features: str | None
    cost: Cost
    subtasks: list[str] = []
    tasks: list[str] = []
    task_of: list[int] = []
    order: list[int] | None = None
    aggregate: str = "max"
    replacement: bool = False
    vote_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    table: FileRecord | None = None
    held_out: FileRecord | None = None
    beside: dict[str, FileRecord] = {}
    dataflex: str = __version__


@dataclass(frozen=True)
class Places:
    """Where samples were read. domains: int64 [n], places in the list of names. files: names or None [n].

    rows: int64 [n], in the file from 0 (without a file in the dataset); -1 for what is not made from one row.
    """

    domains: NDArray[np.int64]
    files: NDArray[Any]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Scored:
    """A folder with scores.

    score: float64 [n], by sample id. each: float32 [n, subtasks], where there is more than one.
    """

    folder: Path
    facts: Facts
    places: Places
    score: NDArray[np.float64]
    each: NDArray[np.float32] | None

    def __len__(self) -> int:
        return len(self.score)

    @property
    def table(self) -> NDArray[np.float64]:
        """What is chosen by, float64 [n, M]: the subtasks' scores, else the score."""
        return (self.score[:, None] if self.each is None else self.each).astype(np.float64)


def column_of(subtask: str) -> str:
    """The column that a subtask's scores are in."""
    return f"{SCORE}: {subtask}"


def by_rule(table: NDArray[Any], rule: str) -> NDArray[Any]:
    """The score of each sample [n] out of its scores [n, M]: their mean if the rule goes by it, else the largest."""
    found: NDArray[Any] = table.mean(axis=1) if rule == "mean" else table.max(axis=1)
    return found


def write(folder: Path, facts: Facts, pool: Pool, table: NDArray[Any], held_out: Pool | None = None) -> None:
    """Write the files.

    table: float [n, M], a column for each of the facts' subtasks, or one. held_out: of the same datasets, what was not
    scored because it is the target.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = _kept_beside(folder, facts.pool)
    (folder / FACTS).unlink(missing_ok=True)  # what it says is of the files that are written over
    scored: dict[str, NDArray[Any]] = {SCORE: by_rule(table, facts.aggregate)}
    if table.shape[1] > 1:
        scored |= {column_of(name): table[:, j] for j, name in enumerate(facts.subtasks)}
    columns = [*pool_columns(pool), *score_columns(scored, len(pool), facts.component)]
    write_table(folder / TABLE, columns, len(pool))
    changes: dict[str, Any] = {"table": FileRecord.of(folder / TABLE), "beside": kept}
    if held_out is not None and held_out.rows is not None:
        write_table(folder / HELD_OUT, pool_columns(held_out), len(held_out))
        changes["held_out"] = FileRecord.of(folder / HELD_OUT)
    write_sealed(folder / FACTS, facts.model_copy(update=changes).model_dump())


def _kept_beside(folder: Path, pool: str) -> dict[str, FileRecord]:
    """The files that the scores in ``folder`` name besides their own, where they are of the same pool; else removed."""
    try:
        before = read_sealed(folder / FACTS, Facts)
    except DamagedError:
        return {}
    if before.pool == pool:
        return before.beside
    for name in before.beside:
        (folder / name).unlink(missing_ok=True)
    return {}


def drop_beside(folder: Path, names: Iterable[str]) -> None:
    """Remove files that stand beside scores: those are to be written over, and what they say of samples with them."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    try:
        facts = read_sealed(folder / FACTS, Facts)
    except DamagedError:
        return
    write_sealed(folder / FACTS, facts.model_copy(update={"beside": {}}).model_dump())


def name_beside(folder: Path, paths: Iterable[Path]) -> None:
    """Have the scores in ``folder`` say what was written beside them."""
    facts = read_sealed(folder / FACTS, Facts)
    beside = {path.name: FileRecord.of(path) for path in paths}
    write_sealed(folder / FACTS, facts.model_copy(update={"beside": beside}).model_dump())


def check_beside(scored: Scored, path: Path) -> None:
    """UserError where a file beside scores is not the one that was written with them; others may be anybody's."""
    record = scored.facts.beside.get(path.name)
    problem = None if record is None else record.differs(path)
    if problem:
        raise UserError(
            f"select_from: {scored.folder}: {problem}; embed again, or put a file of your own into a folder "
            f"without {FACTS}"
        )


def with_earlier_cost(folder: Path, facts: Facts) -> Facts:
    """``facts`` with the cost of the earlier start that wrote the folder's scores of the same, where its shards served.

    Those of a start that was ended before stay `Cost.samples_taken_up`.
    """
    if not facts.cost.samples_taken_up:
        return facts
    try:
        before = read_sealed(folder / FACTS, Facts)
    except DamagedError:
        return facts
    same = ("pool", "component", "checkpoint", "step")
    if any(getattr(before, key) != getattr(facts, key) for key in same):
        return facts
    own_s = max(0.0, facts.cost.selection_seconds - facts.cost.warmup_seconds)
    own = {"selection_seconds": own_s, "warmup_seconds": 0.0, "samples_taken_up": 0}
    return facts.model_copy(update={"cost": before.cost.plus(facts.cost.model_copy(update=own))})


def read(folder: Path) -> Scored:
    """The scores of a folder. UserError where they are not there, or not as they were written."""
    made_by = f"make it with: dataflex-cli score CFG output_dir={folder}"
    if not (folder / TABLE).is_file() and (folder / OLD).is_file():
        raise UserError(f"select_from: {folder} has {OLD} of an older version, and no {TABLE}; {made_by}")
    missing = [name for name in (FACTS, TABLE) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"select_from: {folder} has no {missing[0]}; {made_by}")
    try:
        facts = read_sealed(folder / FACTS, Facts)
        several = [column_of(name) for name in facts.subtasks] if len(facts.subtasks) > 1 else []
        columns = read_columns(_checked(folder / TABLE, facts.table), [*PLACE, SCORE, *several])
        ids, score = columns["sample_id"].to_numpy(), columns[SCORE].to_numpy(dtype=np.float64)
        if not np.array_equal(ids, np.arange(len(ids))):
            raise DamagedError(f"{TABLE}: its samples are not 0 to {len(ids) - 1}, in order")
        each = columns[several].to_numpy(dtype=np.float32) if several else None
        return Scored(folder, facts, _places(columns, facts.domains), score, each)
    except (DamagedError, UserError) as error:
        raise _refusal(folder, error) from None


def read_held_out(scored: Scored) -> Places | None:
    """The rows that val_size held out of the datasets that were scored; None where it did not."""
    record, folder = scored.facts.held_out, scored.folder
    if record is None:
        return None
    try:
        return _places(read_columns(_checked(folder / HELD_OUT, record), PLACE), scored.facts.domains)
    except (DamagedError, UserError) as error:
        raise _refusal(folder, error) from None


def _refusal(folder: Path, error: Exception) -> UserError:
    where = "" if isinstance(error, UserError) else f"{folder}: "  # which names its file
    return UserError(f"select_from: {where}{cut(str(error), 400)}; score again")


def _checked(path: Path, record: FileRecord | None) -> Path:
    problem = f"it does not name {path.name}" if record is None else record.differs(path)
    if problem:
        raise DamagedError(problem)
    return path


def _places(columns: pd.DataFrame, names: list[str]) -> Places:
    domains = columns["dataset"].map({name: number for number, name in enumerate(names)}).to_numpy(dtype=np.float64)
    unknown = np.flatnonzero(np.isnan(domains))
    if len(unknown):
        raise DamagedError(f"'{columns['dataset'].iloc[unknown[0]]}' is none of the datasets that were scored")
    rows = columns["row"].fillna(-1).to_numpy(dtype=np.int64)
    return Places(domains.astype(np.int64), columns["file"].to_numpy(dtype=object), rows)
