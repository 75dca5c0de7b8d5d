"""Of which weights `export` and `eval` are, where output_dir holds a finished run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataflex.config import load_config
from dataflex.config.rules.commands import with_trained_weights
from dataflex.config.schema import ModelSection
from dataflex.utils.errors import UserError


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


def test_select_asks_for_neither_a_model_nor_a_target() -> None:
    keys = {"dataset": "a", "train_type": "dynamic_select", "component_name": "near", "model_name_or_path": "/not/here"}
    cfg = load_config({**keys, "output_dir": "out"}, command="select", quiet=True)
    assert cfg.data.eval_dataset == ()
    load_config({"dataset": "a", "select_from": "x.npy", "select_dir": "chosen"}, command="select", quiet=True)
    lacking = {"score": ["eval_dataset", "/not/here"], "embed": ["eval_dataset", "/not/here"], "select": []}
    for command, texts in lacking.items():
        with pytest.raises(UserError) as error:
            load_config({**keys, "select_from": "x.npy"}, command=command, quiet=True)
        assert "output_dir: missing" in str(error.value), "it is where select writes without select_dir"
        assert all(text in str(error.value) for text in texts)
        assert len(str(error.value).splitlines()) == 1 + len(texts)
