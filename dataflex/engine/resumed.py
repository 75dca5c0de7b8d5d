"""What may change between the start of a run and its resume, so that config.yaml says how the run was really made.

A checkpoint brings back its optimizer, schedule and plan whatever the config says: a changed key that would be read and
then not heeded is refused, one that holds from now on is said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dataflex.config import Config
from dataflex.config.schema import OutputSection
from dataflex.config.score_section import ScoreSection
from dataflex.engine import checkpoint
from dataflex.engine.own_files import CONFIG
from dataflex.engine.run_config import run_config
from dataflex.utils.errors import UserError, shown
from dataflex.utils.logging import logger

# Where and how it runs, and what is written: of no influence on what is trained, or found out otherwise (a checkpoint
# names its data by content; `component_params` are those of all the components' files).
FREE = {
    *OutputSection.model_fields,
    *ScoreSection.model_fields,
    "trust_remote_code",
    "gradient_checkpointing",
    "disable_gradient_checkpointing",
    "use_reentrant_gc",
    "dataset_dir",
    "tokenized_path",
    "overwrite_cache",
    "preprocessing_num_workers",
    "dataloader_num_workers",
    "per_device_eval_batch_size",
    "ddp_timeout",
    "components_cfg_file",
    "component_modules",
    "warn_domain_epochs",
    "scoring_batch_tokens",
}
# Heeded from the resume on; that the global batch stays is found out from the checkpoint.
SAID = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "component_params",
    "nonfinite",
    "nonfinite_limit",
    "model_name_or_path",
    "flash_attn",
    "deepspeed",
    "eval_dataset",
    "mixer_eval_dataset",
    "reference_model_path",
    "max_steps",
    "train_step",
    "num_train_epochs",
    "update_times",
}


def check_resume(cfg: Config, start: Path) -> None:
    """Compare ``cfg`` with what the checkpoint ``start`` was made with, as far as it lies in it or beside it.

    UserError naming every changed key that a resume would not heed, and for a run that would end before ``start``.
    """
    step = checkpoint.saved_step(start)
    if cfg.fixed_steps is not None and step > cfg.fixed_steps:
        raise UserError(f"max_steps: the run would end after {cfg.fixed_steps} steps, {start} has done {step}")
    found = next((path for path in (start / CONFIG, start.parent / CONFIG) if path.is_file()), None)
    if found is None:
        return
    changes = _changes(_read(found), cfg)
    refused = [change for key, change in changes.items() if key.split(".")[0] not in SAID]
    if refused:
        raise UserError(
            f"{'; '.join(refused)}: a resume goes on as {start} was made; put it back, or start in another output_dir"
        )
    for change in changes.values():
        logger.warning(f"{change}, heeded from this resume on")


def _read(path: Path) -> dict[str, Any]:
    """The configuration that a run wrote. UserError where it is not one, or no longer one."""
    try:
        before = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problem = f"cannot be read ({type(error).__name__})"
    else:
        if isinstance(before, dict):
            return before
        problem = f"holds no configuration but {shown(before)}"
    raise UserError(f"{path}: {problem}; what the run was made with is not known: remove the file to go on without it")


def _changes(before: dict[str, Any], cfg: Config) -> dict[str, str]:
    """What is said of each changed key that is not free. A key that ``before`` lacks has its default there."""
    now, default = _by_param(_plain(run_config(cfg))), _plain(Config().dump_flat())
    before = _by_param(before)
    keys = [key for key in [*now, *(before.keys() - now.keys())] if key not in FREE]
    pairs = {key: (before.get(key, default.get(key)), now.get(key, default.get(key))) for key in keys}
    return {key: f"{key}: was {old}, now {new}" for key, (old, new) in pairs.items() if old != new}


def _by_param(flat: dict[str, Any]) -> dict[str, Any]:
    """Every param of a component under a key of its own, ``component_params.<kind>.<param>``."""
    kinds = flat.get("component_params") or {}
    params = {f"component_params.{kind}.{key}": value for kind, own in kinds.items() for key, value in own.items()}
    return {key: value for key, value in flat.items() if key != "component_params"} | params


def _plain(flat: dict[str, Any]) -> dict[str, Any]:
    """As a YAML file holds it."""
    plain: dict[str, Any] = yaml.safe_load(yaml.safe_dump(flat))
    return plain
