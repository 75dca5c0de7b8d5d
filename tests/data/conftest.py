"""A private `datasets` cache for every test, and small folders of data to read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from dataflex.config import Config
from dataflex.config.schema import DataSection, MethodSection, TrainSection

ROWS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say hello.", "input": "", "output": "hello"},
    {"instruction": "Größe?", "input": "", "output": "1,5 m"},
]


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    import datasets

    cache = tmp_path_factory.mktemp("hf_cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    yield cache


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """An empty dataset_dir."""
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def add(data_dir: Path) -> Callable[..., Path]:
    """add("name", rows or bytes or text, file="x.json", **entry): a file and its dataset_info entry."""

    def add(name: str, content: Any = ROWS, file: str | None = None, **entry: Any) -> Path:
        path = data_dir / (file or f"{name}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif content is not None:
            path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        info_file = data_dir / "dataset_info.json"
        entries = json.loads(info_file.read_text()) if info_file.exists() else {}
        info_file.write_text(json.dumps(entries | {name: {"file_name": path.name, **entry}}))
        return path

    return add


@pytest.fixture
def config(data_dir: Path) -> Callable[..., Config]:
    """config("a", "b", stage="sft", seed=1, **data keys): the configuration of a run over these datasets."""

    def config(*names: str, stage: str = "sft", seed: int = 1, **keys: Any) -> Config:
        settings: dict[str, Any] = {"dataset_dir": str(data_dir), "template": "default", "cutoff_len": 512}
        return Config(
            data=DataSection(**{"dataset": names, **settings, **keys}),
            method=MethodSection(stage=stage),
            train=TrainSection(seed=seed),
        )

    return config
