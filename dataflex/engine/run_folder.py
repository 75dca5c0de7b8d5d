"""A run's folder: one output_dir is one run, so an earlier one is gone on with, cleared, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from dataflex.core.run_files import RESULTS, cleared
from dataflex.engine import checkpoint, own_files, start_over
from dataflex.engine.resumed import check_resume
from dataflex.engine.run_config import run_config
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.files import finish_removals, remove, write_atomically
from dataflex.utils.logging import logger

if TYPE_CHECKING:
    from dataflex.config import Config

_SIGNS = ("trainer_log.jsonl", "decisions", RESULTS)


def prepare(cfg: Config) -> Path | None:
    """Make the run folder; return the checkpoint to resume from. A collective.

    The effective config is written where the run begins; a run that goes on writes it once its checkpoint is loaded.
    UserError where the folder holds an earlier run that cannot be gone on with, or files that are not ours.
    """
    answer = dist.broadcast_object(_prepare_or_error(cfg) if dist.is_main() else None)
    if isinstance(answer, UserError):
        raise answer
    return answer


def drop_later(folder: Path, step: int) -> None:
    """Remove what an interrupted run wrote after ``step``: the resumed run writes it again. A collective."""
    if dist.is_main():
        for old in folder.glob("checkpoint-*"):
            if checkpoint.step_of(old) > step:
                logger.warning(f"removed {old}, which is later than the checkpoint resumed from")
                remove(old)
        for old in (folder / "decisions").glob("step_*"):
            if checkpoint.step_of(old.with_suffix("")) >= step:
                remove(old)
        for log in folder.glob("*weights.jsonl"):
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            first = (
                step + 1 if log.name == "weights.jsonl" else step
            )  # weights are of steps done, mixtures of those to come
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first]
            write_atomically(log, "".join(kept))
    dist.barrier()


def _prepare_or_error(cfg: Config) -> Path | None | UserError:
    try:
        return _prepare(cfg, Path(cfg.output.output_dir))
    except UserError as exc:
        return exc
    except OSError as exc:
        return UserError(f"output_dir: cannot write to '{cfg.output.output_dir}': {exc.strerror or exc}")


def _prepare(cfg: Config, folder: Path) -> Path | None:
    if folder.exists() and folder.resolve() == Path(cfg.model.model_name_or_path).resolve():
        raise UserError(f"output_dir: {folder} is also model_name_or_path, which the run would write over")
    finish_removals(folder)
    if not _holds_run(folder):
        own_files.claim(folder, cfg.source, cfg.output.overwrite_output_dir)
    if cfg.output.overwrite_output_dir and not cfg.output.resume_from_checkpoint:
        _clear(folder)
    start = _checkpoint(cfg, folder)
    if start is not None and not checkpoint.is_plain(start):
        check_resume(cfg, start)
    folder.mkdir(parents=True, exist_ok=True)
    if start is None:
        write_config(cfg)
    return start


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


def _checkpoint(cfg: Config, folder: Path) -> Path | None:
    """Where to go on: the named checkpoint, or the folder's newest whole one unless told otherwise."""
    named = cfg.output.resume_from_checkpoint
    if cfg.output.resume_path is not None:
        return _named(cfg, Path(cfg.output.resume_path).expanduser(), folder)
    start = None if named is False else checkpoint.newest_whole_here(folder)
    if start is not None:
        return start
    if named is True:
        raise UserError(
            f"resume_from_checkpoint: there is no whole checkpoint in {folder}; auto starts the run where there is none"
        )
    if cfg.output.overwrite_output_dir:  # with auto, which found nothing to go on from
        _clear(folder)
    sign = _sign(folder)
    if sign is None:
        return None
    why = "is not to be gone on with" if named is False else start_over.obstacle(cfg, folder)
    if why is not None:
        lacks = "" if named is False else "has no whole checkpoint to go on from and "
        raise UserError(
            f"output_dir: {folder} holds an earlier run ({sign}) that {lacks}{why}; "
            "name another folder, or start over with overwrite_output_dir: true"
        )
    start_over.make_room(folder)
    return None


def _named(cfg: Config, start: Path, folder: Path) -> Path:
    """A checkpoint that the user names; what ``folder`` holds after it is only dropped where that is asked for."""
    problem = "it does not exist" if not start.is_dir() else checkpoint.broken(start)
    if start.is_dir() and (start / checkpoint.POINTER).exists():
        problem = f"a folder of checkpoints; name one in it ({checkpoint.POINTER} is {_named_by(start)})"
    if problem and not checkpoint.is_plain(start):
        raise UserError(f"resume_from_checkpoint: {start}: {problem}")
    same = start.resolve().parent == folder.resolve()
    later = [p for p in folder.glob("checkpoint-*") if not same or checkpoint.step_of(p) > checkpoint.step_of(start)]
    if later and not cfg.output.overwrite_output_dir:
        newest = max(later, key=checkpoint.step_of)
        raise UserError(
            f"resume_from_checkpoint: {newest} would be written again; name another output_dir, or drop it with "
            "overwrite_output_dir: true"
        )
    if not same:
        _clear(folder)
    return start


def _named_by(directory: Path) -> str:
    return (directory / checkpoint.POINTER).read_text(encoding="utf-8").strip()


def _clear(folder: Path) -> None:
    """Remove what an earlier run wrote; other files stay, and so does all in a folder that holds no run."""
    if not _holds_run(folder):
        return
    for pattern in cleared():
        for old in folder.glob(pattern):
            remove(old)
