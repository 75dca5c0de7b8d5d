"""What is done once: tokenising, its cache, the fingerprint, tokenized_path, ranks and processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.config import Config
from dataflex.data.encoding.tokenize import Encoder
from dataflex.data.sources import source as source_module
from dataflex.utils.errors import UserError
from tests.data.helpers import load, numbered, prompts
from tests.processes import PATIENCE_S

Add = Callable[..., Path]
MakeConfig = Callable[..., Config]
REPO = Path(__file__).parents[2]


@pytest.fixture
def count_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that were tokenised."""
    sizes: list[int] = []
    batch = Encoder.batch

    def counted(self: Encoder, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        sizes.append(len(rows["turns"]))
        return batch(self, rows)

    monkeypatch.setattr(Encoder, "batch", counted)
    return sizes


def test_the_second_start_tokenises_nothing(
    add: Add, config: MakeConfig, count_batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = add("x", numbered(10))
    first = load(config("x"))
    assert sum(count_batches) == 10
    monkeypatch.setattr(source_module, "read_rows", None)
    assert load(config("x")).train.fingerprint == first.train.fingerprint
    os.utime(path, (1, 1))
    load(config("x", preprocessing_num_workers=2))
    assert sum(count_batches) == 10
    load(config("x", overwrite_cache=True))
    assert sum(count_batches) == 20


@pytest.mark.parametrize(
    "change",
    [
        {"cutoff_len": 9},
        {"template": "alpaca"},
        {"train_on_prompt": True},
        {"mask_history": True},
        {"max_samples": 3},
    ],
)
def test_whatever_changes_the_samples_changes_the_fingerprint(
    add: Add, config: MakeConfig, count_batches: list[int], change: dict[str, Any]
) -> None:
    add("x", numbered(5))
    first = load(config("x")).train.fingerprint
    changed = load(config("x", **change)).train.fingerprint
    assert changed != first and len(count_batches) == 2
    add("x", numbered(6))
    assert load(config("x")).train.fingerprint not in (first, changed)


def test_the_fingerprint_holds_in_other_processes_and_places(
    add: Add, config: MakeConfig, data_dir: Path, tmp_path: Path
) -> None:
    add("x", numbered(5))
    here = load(config("x")).train.fingerprint
    moved = tmp_path / "elsewhere"
    data_dir.rename(moved)
    code = f"""
from dataflex.config import Config
from dataflex.config.schema import DataSection
from dataflex.data.load import load_data
from tests.tiny import byte_tokenizer
data = DataSection(dataset=("x",), dataset_dir={str(moved)!r}, template="default", cutoff_len=512)
print(load_data(Config(data=data), byte_tokenizer()).train.fingerprint)
"""
    env = {
        **os.environ,
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "PYTHONHASHSEED": "7",
        "HF_HUB_OFFLINE": "1",
    }
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=REPO)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == here
    assert run.stderr == ""


RANK_CODE = """
import sys
import torch.distributed as dist
from dataflex.config import Config
from dataflex.config.schema import DataSection
from dataflex.data.load import load_data
from dataflex.data.encoding.tokenize import Encoder
from tests.tiny import byte_tokenizer
rank, folder, rendezvous = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
calls = []
batch = Encoder.batch
Encoder.batch = lambda self, rows: (calls.append(len(rows["turns"])), batch(self, rows))[1]
for overwrite in (False, True):
    data = DataSection(dataset=("x",), dataset_dir=folder, template="default", overwrite_cache=overwrite)
    out = load_data(Config(data=data), byte_tokenizer())
print(sum(calls), out.train.fingerprint)
dist.barrier()
dist.destroy_process_group()
"""


def test_rank_0_tokenises_and_the_others_hit_its_cache(add: Add, data_dir: Path, tmp_path: Path) -> None:
    add("x", numbered(20))
    env = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK_CODE]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(data_dir), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=REPO,
        )
        for rank in range(2)
    ]  # fmt: skip
    outs = [rank.communicate(timeout=PATIENCE_S) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outs
    (first, print_0), (second, print_1) = (out.split() for out, _ in outs)
    assert (first, second) == ("40", "0")
    assert print_0 == print_1


def test_tokenized_path(
    add: Add, config: MakeConfig, tmp_path: Path, count_batches: list[int], private_cache: Path
) -> None:
    add("x", numbered(5))
    keys = {"tokenized_path": str(tmp_path / "tokens")}
    first = load(config("x", **keys))
    assert len(count_batches) == 1
    shutil.rmtree(private_cache / "dataflex")
    second = load(config("x", **keys))
    assert len(count_batches) == 1
    assert second.train.fingerprint == first.train.fingerprint and prompts(second.train) == prompts(first.train)
    with pytest.raises(UserError, match=r"tokens/x was made otherwise \(changed: template, cutoff_len\); name"):
        load(config("x", **keys, template="alpaca", cutoff_len=99))
    load(config("x", **keys, template="alpaca", overwrite_cache=True))
    assert json.loads((tmp_path / "tokens/x/dataflex_tokenized.json").read_text())["made_from"]["stage"] == "sft"
    with pytest.raises(UserError, match=r"changed: template\)"):
        load(config("x", **keys))


def test_tokenized_path_does_not_touch_a_foreign_folder(add: Add, config: MakeConfig, tmp_path: Path) -> None:
    add("x", numbered(5))
    (tmp_path / "tokens" / "x").mkdir(parents=True)
    (tmp_path / "tokens" / "x" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="tokens/x exists but holds no dataflex_tokenized.json"):
        load(config("x", tokenized_path=str(tmp_path / "tokens"), overwrite_cache=True))
    assert (tmp_path / "tokens" / "x" / "mine.txt").exists()


def test_several_processes_give_the_same_rows(add: Add, config: MakeConfig) -> None:
    add("x", numbered(1200))
    many = load(config("x", preprocessing_num_workers=2))
    one = load(config("x", overwrite_cache=True))
    assert prompts(many.train) == prompts(one.train) == [str(i) for i in range(1200)]


def test_the_pool_holds_no_samples_in_memory(add: Add, config: MakeConfig) -> None:
    add("x", numbered(50))
    dataset = load(config("x")).train.dataset
    assert dataset.cache_files and dataset._indices is None
