"""The config that a run folder keeps: it starts the same run again, from whatever folder it is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.data.info import find_dataset_dir

if TYPE_CHECKING:
    from dataflex.config import Config

_FOLDERS = ("tokenized_path", "features_dir")
_FILES = ("deepspeed", "components_cfg_file", "sample_weight", "class_weights")
_MODELS = ("model_name_or_path", "adapter_name_or_path", "reference_model_path", "proxy_model_name_or_path")


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
    modules = flat.get("component_modules", [])
    if modules:
        flat["component_modules"] = [_absolute(name) if name.endswith(".py") else name for name in modules]
    return flat


def _absolute(path: str) -> str:
    return os.path.abspath(Path(path).expanduser())
