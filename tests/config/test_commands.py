"""Of which weights `export` and `eval` are, where output_dir holds a finished run."""

from __future__ import annotations

from pathlib import Path

from dataflex.config import load_config
from dataflex.config.rules.commands import with_trained_weights
from dataflex.config.schema import ModelSection


def trained(out: Path) -> ModelSection:
    keys = {"model_name_or_path": "base", "train_from_scratch": True, "dataset": "a", "output_dir": str(out)}
    return with_trained_weights(load_config(keys, quiet=True)).model


def test_an_adapter_comes_before_a_whole_model_and_a_whole_model_is_not_begun_anew(tmp_path: Path) -> None:
    base = ModelSection(model_name_or_path="base", train_from_scratch=True)
    assert trained(tmp_path / "none") == trained(tmp_path) == base
    (tmp_path / "config.json").write_text("{}")
    assert trained(tmp_path) == ModelSection(model_name_or_path=str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert trained(tmp_path) == base.model_copy(update={"adapter_name_or_path": str(tmp_path)})
