"""A run that ended before its first checkpoint: the same command starts it again, in the same folder."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dataflex.config.yaml_reader import parse_yaml, read_mapping
from dataflex.core.run_files import RESULTS
from dataflex.engine import checkpoint
from dataflex.engine.folder.own_files import CONFIG
from dataflex.engine.run_config import POLICY, WATCHED, run_config
from dataflex.utils import dist
from dataflex.utils.errors import UserError, shown
from dataflex.utils.files import remove
from dataflex.utils.logging import logger

if TYPE_CHECKING:
    from dataflex.config import Config

# Those that tell of a run come last: a start that ends between two renamings is followed by one that goes on with them.
LOGS = ("trainer_state.json", "*weights.jsonl", "*average_weights.json", "decisions", "trainer_log.jsonl")
_SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps")
_WEIGHTS = ("model*.safetensors*", "adapter_model.safetensors")


def obstacle(cfg: Config, folder: Path) -> str | None:
    """Why the run in ``folder``, which has no whole checkpoint, is not to be started over by ``cfg``; None if it is."""
    if (folder / RESULTS).exists():
        return f"has results ({RESULTS})"
    weights = [p for name in _WEIGHTS for place in ("", "checkpoint-*/") for p in folder.glob(place + name)]
    if weights:
        return f"has exported weights ({weights[0].relative_to(folder)})"
    try:
        before = read_mapping(folder / CONFIG, "earlier run's config")
    except UserError as problem:
        return f"has no configuration to compare with ({problem})"
    different = [key for key in changed(before, cfg) if key not in WATCHED | POLICY]
    if set(different) <= set(_SPLIT) and _may_be_split_anew(before, cfg):
        return None
    return f"has another {said_change(different[0], before, cfg)}" if different else None


def _may_be_split_anew(before: Mapping[str, Any], cfg: Config) -> bool:
    """Whether ``before`` has this global batch with some number of processes, which no config says."""
    micro_batch, accumulation = (before.get(key) for key in _SPLIT)
    if not isinstance(micro_batch, int) or not isinstance(accumulation, int) or min(micro_batch, accumulation) < 1:
        return False
    train = cfg.train
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps * dist.world_size()
    return batch % (micro_batch * accumulation) == 0


def changed(before: Mapping[str, Any], cfg: Config) -> list[str]:
    """The keys in which the effective configuration ``before``, as read from a config.yaml, differs from ``cfg``."""
    now = _plain(cfg)
    return sorted(key for key in {*before, *now} if before.get(key) != now.get(key))


def said_change(key: str, before: Mapping[str, Any], cfg: Config) -> str:
    return f"{key} ({shown(before.get(key))}, here {shown(_plain(cfg).get(key))})"


def _plain(cfg: Config) -> dict[str, Any]:
    plain: dict[str, Any] = parse_yaml(yaml.safe_dump(run_config(cfg)), "config")
    return plain


def make_room(folder: Path) -> None:
    """Rename what the earlier start logged, to trainer_log.1.jsonl and so on, and drop its half-saved checkpoints."""
    logs = [p for name in LOGS for p in folder.glob(name) if p.is_dir() or p.stat().st_size]
    number = 1
    while any(_numbered(path, number).exists() for path in logs):
        number += 1
    for path in logs:
        path.rename(_numbered(path, number))
    kept = f"; its logs are kept as {', '.join(_numbered(path, number).name for path in logs)}" if logs else ""
    logger.warning(f"{folder}: an earlier start of this run left no whole checkpoint; starting over{kept}")
    for broken in folder.glob("checkpoint-*"):
        if (broken / checkpoint.MANIFEST).exists():
            broken.rename(_free(folder / f"damaged-{broken.name}"))
        else:
            remove(broken)


def _free(path: Path) -> Path:
    """``path``, or where something has that name, the first free one of path.2, path.3, ..."""
    numbers = itertools.count(2)
    free = path
    while free.exists():
        free = path.with_name(f"{path.name}.{next(numbers)}")
    return free


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")
