"""The config that a run folder keeps: it starts the same run again, from whatever folder it is read.

And what a changed key means to a run that is there already.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.config.schema import OutputSection
from dataflex.config.sections.export import ExportSection
from dataflex.config.sections.score import ScoreSection
from dataflex.data.sources.info import find_dataset_dir

if TYPE_CHECKING:
    from dataflex.config import Config

_FOLDERS = ("tokenized_path", "features_dir")
_FILES = ("deepspeed", "components_cfg_file", "sample_weight", "class_weights")
_MODELS = ("model_name_or_path", "adapter_name_or_path", "reference_model_path", "proxy_model_name_or_path")

# How a run is watched, stored and ended, not what it computes: the same run whatever they are.
WATCHED = {
    *ExportSection.model_fields,
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "cache_dir",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "save_strategy",
    "eval_strategy",
    "eval_steps",
    "per_device_eval_batch_size",
    "plot_loss",
    "report_to",
    "tracker_options",
    "run_name",
    "max_hours",
    "stop_grace_seconds",
    "ddp_timeout",
    "preprocessing_num_workers",
    "dataloader_num_workers",
    "overwrite_cache",
    "dry_run",
}
# Changed where a run was stopped by what they say.
POLICY = {"nonfinite", "nonfinite_limit"}
# A resume may change these besides without a word: what is written, how it runs, and what a checkpoint finds out itself
# (it names its data by content; `component_params` are those of all the components' files).
FREE = {
    *WATCHED,
    *OutputSection.model_fields,
    *ScoreSection.model_fields,
    "trust_remote_code",
    "gradient_checkpointing",
    "disable_gradient_checkpointing",
    "use_reentrant_gc",
    "dataset_dir",
    "tokenized_path",
    "components_cfg_file",
    "component_modules",
    "warn_domain_epochs",
    "scoring_batch_tokens",
}
# Heeded from the resume on, and said; that the global batch stays is found out from the checkpoint.
SAID = {
    *POLICY,
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "component_params",
    "model_name_or_path",
    "model_revision",
    "flash_attn",
    "fused_head",
    "deepspeed",
    "eval_dataset",
    "subtask_column",
    "mixer_eval_dataset",
    "reference_model_path",
    "max_steps",
    "train_step",
    "num_train_epochs",
    "update_times",
}


def run_config(cfg: Config) -> dict[str, Any]:
    """The effective config as flat YAML keys, its paths absolute: all but output_dir and names that are no paths here.

    UserError where dataset_dir is not there.
    """
    flat = cfg.dump_flat()
    flat["dataset_dir"] = _absolute(str(find_dataset_dir(cfg.data.dataset_dir, cfg.source)))
    flat |= {key: _absolute(flat[key]) for key in _FOLDERS if key in flat}
    for key in (*_FILES, *_MODELS):
        value = flat.get(key)
        if not isinstance(value, str):
            continue
        # A column that is called as a file here is a column: a file of weights ends in .npy or .json.
        is_path = key not in ("sample_weight", "class_weights") or Path(value).suffix in (".npy", ".json")
        if is_path and Path(value).expanduser().exists():
            flat[key] = _absolute(value)
    if cfg.output.resume_path is not None:
        flat["resume_from_checkpoint"] = _absolute(cfg.output.resume_path)
    modules = flat.get("component_modules", [])
    if modules:
        flat["component_modules"] = [_absolute(name) if name.endswith(".py") else name for name in modules]
    return flat


def _absolute(path: str) -> str:
    return os.path.abspath(Path(path).expanduser())
