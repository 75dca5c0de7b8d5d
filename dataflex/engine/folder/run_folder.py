"""A run's folder: one output_dir is one run, so an earlier one is gone on with, cleared, or refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import yaml
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from dataflex.config.yaml_reader import read_mapping
from dataflex.core.run_files import EVALUATION, RESULTS, cleared
from dataflex.engine import checkpoint
from dataflex.engine.folder import own_files, start_over
from dataflex.engine.folder.resumed import check_resume
from dataflex.engine.run_config import run_config
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.files import finish_removals, remove, write_atomically
from dataflex.utils.logging import logger
from dataflex.utils.records import DamagedError, read_lines

if TYPE_CHECKING:
    from dataflex.config import Config
    from dataflex.core.context import Run

T = TypeVar("T")
_SIGNS = ("trainer_log.jsonl", "decisions", RESULTS)


@with_config(ConfigDict(extra="allow"))
class _Line(TypedDict):
    """A line of a *weights.jsonl as far as it is read again."""

    step: Annotated[int, Field(strict=True)]


@dataclass(frozen=True)
class Start:
    """How a run begins in its folder. checkpoint: to go on from, None for a start.

    earlier: what is done to an earlier run there once the run's inputs have been read: "" (there is none, or it is
    gone on with), "clear" or "rename".
    """

    checkpoint: Path | None
    earlier: Literal["", "clear", "rename"] = ""


def prepare(cfg: Config) -> Start:
    """Look at the run folder, and say how the run begins there. A collective; `begin` then makes room.

    UserError where the folder holds an earlier run that cannot be gone on with, or files that are not ours.
    """
    answer = dist.broadcast_object(_made_or_error(cfg, _prepare) if dist.is_main() else None)
    if isinstance(answer, UserError):
        raise answer
    assert answer is not None
    return answer


def begin(cfg: Config, start: Start) -> None:
    """Make room for a run whose inputs have been read and checked. A collective.

    The effective config is written where the run begins; a run that goes on writes it once its checkpoint is loaded.
    """
    answer = dist.broadcast_object(_made_or_error(cfg, partial(_begin, start=start)) if dist.is_main() else None)
    if isinstance(answer, UserError):
        raise answer


def go_on(folder: Path, start: Path, run: Run) -> None:
    """Let ``folder`` hold what the run wrote up to ``run.step`` and nothing later, which it writes again. A collective.

    start: the checkpoint that it goes on from. Where that lies in another run's folder, the decisions and the lines of
    *weights.jsonl up to there are copied from it. UserError naming a damaged line.
    """
    dist.together(lambda: _go_on(folder, start.parent, run) if dist.is_main() else None)


def _go_on(folder: Path, source: Path, run: Run) -> None:
    kept = {log.name: _lines_up_to(log, run.step) for log in source.glob("*weights.jsonl")}
    for old in folder.glob("checkpoint-*"):
        if checkpoint.step_of(old) > run.step:
            logger.warning(f"removed {old}, which is later than the checkpoint resumed from")
            remove(old)
    if run.step < run.total_steps:
        remove(folder / RESULTS)  # the mark of a finished run
        remove(folder / EVALUATION)
    for old in (folder / "decisions").glob("step_*"):
        if not _decided_before(old, run.step):
            remove(old)
    if source.resolve() != folder.resolve() and run.step:
        _copy_decisions(source, folder, run.step)
    for name, lines in kept.items():
        if lines or (folder / name).exists():
            write_atomically(folder / name, lines)


def _lines_up_to(log: Path, step: int) -> str:
    """The whole lines of a *weights.jsonl that were written before the checkpoint of ``step``."""
    try:
        records = read_lines(log, _Line)
    except DamagedError as error:
        raise UserError(
            f"{log.parent}: {error}; move the file away to go on without its earlier lines, or start over with "
            "overwrite_output_dir: true"
        ) from None
    last = step if log.name == "weights.jsonl" else step - 1  # weights are of steps done, mixtures of those to come
    texts = log.read_bytes().split(b"\n")[:-1]
    return "".join(f"{text.decode()}\n" for text, line in zip(texts, records, strict=True) if line["step"] <= last)


def _decided_before(path: Path, step: int) -> bool:
    return checkpoint.step_of(path.with_suffix("")) < step


def _copy_decisions(source: Path, folder: Path, step: int) -> None:
    if not any((source / name).exists() for name in _SIGNS):
        logger.warning(f"{source} holds no run but checkpoints, so {folder} lacks what was decided before step {step}")
    for file in (source / "decisions").glob("step_*"):
        if _decided_before(file, step):
            (folder / "decisions").mkdir(exist_ok=True)
            shutil.copyfile(file, folder / "decisions" / file.name)


def _made_or_error(cfg: Config, make: Callable[[Config, Path], T]) -> T | UserError:
    try:
        return make(cfg, Path(cfg.output.output_dir))
    except UserError as exc:
        return exc
    except OSError as exc:
        return UserError(f"output_dir: cannot write to '{cfg.output.output_dir}': {exc.strerror or exc}")


def _prepare(cfg: Config, folder: Path) -> Start:
    if folder.exists() and folder.resolve() == Path(cfg.model.model_name_or_path).resolve():
        raise UserError(f"output_dir: {folder} is also model_name_or_path, which the run would write over")
    finish_removals(folder)
    if not _holds_run(folder) and not cfg.output.overwrite_output_dir:
        own_files.refuse_theirs(folder, cfg.source)
    start = _start(cfg, folder)
    if start.checkpoint is None:
        own_files.refuse_source(folder / own_files.CONFIG, cfg.source)
    elif not checkpoint.is_plain(start.checkpoint):
        check_resume(cfg, start.checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    return start


def _begin(cfg: Config, folder: Path, start: Start) -> None:
    if not _holds_run(folder):
        own_files.set_theirs_aside(folder, cfg.source)
    if start.earlier == "clear":
        _clear(folder)
    elif start.earlier == "rename":
        start_over.make_room(folder)
    if start.checkpoint is None:
        write_config(cfg)


def write_config(cfg: Config) -> None:
    """Write the effective config into the run folder, on rank 0; UserError where it is the file that is being run."""
    if dist.is_main():
        text = yaml.safe_dump(run_config(cfg), sort_keys=False, allow_unicode=True)
        own_files.write(Path(cfg.output.output_dir) / own_files.CONFIG, text, cfg.source)


def _holds_run(folder: Path) -> bool:
    return _sign(folder) is not None


def _sign(folder: Path) -> str | None:
    """What tells that there was a run in ``folder``."""
    named = next((name for name in _SIGNS if (folder / name).exists()), None)
    return named or ("checkpoint-*" if any(folder.glob("checkpoint-*")) else None)


def _start(cfg: Config, folder: Path) -> Start:
    """From the named checkpoint, or the folder's newest whole one unless told otherwise, or anew."""
    named, over = cfg.output.resume_from_checkpoint, cfg.output.overwrite_output_dir
    if cfg.output.resume_path is not None:
        return _named(cfg, Path(cfg.output.resume_path).expanduser(), folder)
    found = None if named is False or (over and not named) else checkpoint.newest_whole_here(folder)
    if found is not None:
        return Start(_fitting(cfg, found))
    if named is True:
        raise UserError(
            f"resume_from_checkpoint: there is no whole checkpoint in {folder}; auto starts the run where there is none"
        )
    sign = _sign(folder)
    if over or sign is None:
        return Start(None, "clear" if over else "")
    why = "is not to be gone on with" if named is False else start_over.obstacle(cfg, folder)
    if why is not None:
        lacks = "" if named is False else "has no whole checkpoint to go on from and "
        raise UserError(
            f"output_dir: {folder} holds an earlier run ({sign}) that {lacks}{why}; "
            "name another folder, or start over with overwrite_output_dir: true"
        )
    return Start(None, "rename")


def _named(cfg: Config, start: Path, folder: Path) -> Start:
    """A checkpoint that the user names; what ``folder`` holds after it is only dropped where that is asked for."""
    problem = "it does not exist" if not start.is_dir() else checkpoint.broken(start)
    if start.is_dir() and (start / checkpoint.POINTER).exists():
        named = checkpoint.pointed_to(start)
        problem = "a folder of checkpoints; name one in it" + (f" (the newest is {named.name})" if named else "")
    if problem and not checkpoint.is_plain(start):
        raise UserError(f"resume_from_checkpoint: {start}: {problem}")
    same = start.resolve().parent == folder.resolve()
    if not same and not cfg.output.overwrite_output_dir and _forked_from(start, folder):
        newest = checkpoint.newest_whole_here(folder)
        if newest is not None:
            return Start(_fitting(cfg, newest))
        if start_over.obstacle(cfg, folder) is None:
            return Start(start, "rename" if _holds_run(folder) else "")
    _refuse_later(cfg, start, folder, same)
    if not checkpoint.is_plain(start):
        _fitting(cfg, start)
    return Start(start, "" if same else "clear")


def _forked_from(start: Path, folder: Path) -> bool:
    """Whether the run in ``folder`` began at the checkpoint ``start``, as the same command given again would."""
    try:
        named = read_mapping(folder / own_files.CONFIG, "earlier run's config").get("resume_from_checkpoint")
    except UserError:
        return False
    return isinstance(named, str) and Path(named).expanduser().resolve() == start.resolve()


def _refuse_later(cfg: Config, start: Path, folder: Path, same: bool) -> None:
    """UserError where ``folder`` holds what going on from ``start`` would write again, unless that is asked for."""
    if cfg.output.overwrite_output_dir:
        return
    done = checkpoint.saved_step(start)
    later = [p for p in folder.glob("checkpoint-*") if not same or checkpoint.saved_step(p) > done]
    sign = max(later, key=checkpoint.saved_step, default=None)
    if sign is None and not same and (found := _sign(folder)) is not None:
        sign = folder / found
    if sign is not None:
        raise UserError(
            f"resume_from_checkpoint: {sign} would be written again; name another output_dir, or drop it with "
            "overwrite_output_dir: true"
        )


def _fitting(cfg: Config, start: Path) -> Path:
    """``start``; UserError where this run's processes and micro-batches cannot go on with it."""
    train = cfg.train
    now = (train.per_device_train_batch_size, train.gradient_accumulation_steps, dist.world_size())
    zero = train.deepspeed_config().get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, dict) else None
    nvme = isinstance(offload, dict) and offload.get("device") == "nvme"
    checkpoint.check_start(start, checkpoint.Split(*now), nvme)
    return start


def _clear(folder: Path) -> None:
    """Remove what an earlier run wrote; other files stay, and so does all in a folder that holds no run."""
    if not _holds_run(folder):
        return
    for pattern in cleared():
        for old in folder.glob(pattern):
            if not own_files.kept(old):
                remove(old)
