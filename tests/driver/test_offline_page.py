"""What docs/offline_selection.md says to type: that it fits together, and (slow) that it runs as it stands there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from dataflex.config import load_config
from tests.distributed import PATIENCE_S, ROOT
from tests.driver.workspace import make_model

PAGE = (ROOT / "docs/offline_selection.md").read_text(encoding="utf-8")


def block(heading: str, language: str) -> str:
    """The first block of a language below a heading."""
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE.partition(f"## {heading}")[2], re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


SCRIPT = block("Scoring with a small model", "bash")
YAML = block("Scoring with a small model", "yaml")


def make_folder(folder: Path) -> None:
    """The YAML, models of two sizes, and data in which one of the two datasets is the target's own."""
    (folder / "small_to_large.yaml").write_text(YAML)
    make_model(folder / "small")
    make_model(folder / "large", intermediate_size=96)
    data = folder / "data"
    data.mkdir()
    rows = {
        "pool_a": [{"instruction": f"say {i}", "output": f"{i} {i}"} for i in range(40)],
        "pool_b": [{"instruction": f"spell {'x' * (i % 9)}", "output": "abcdefgh"[: i % 8 + 1]} for i in range(24)],
        "target": [{"instruction": f"say {i}", "output": f"{i} {i}"} for i in range(40, 44)],
    }
    for name, own in rows.items():
        (data / f"{name}.json").write_text(json.dumps(own))
    (data / "dataset_info.json").write_text(json.dumps({name: {"file_name": f"{name}.json"} for name in rows}))


def test_the_commands_of_the_page_fit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small_to_large.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    values = dict(re.findall(r"^(\w+)=\"?([^\"\n]+)\"?$", SCRIPT, re.MULTILINE))
    assert set(values) == {"SMALL", "LARGE", "STATIC"}
    found = {}
    for line in SCRIPT.splitlines():
        if line.startswith("dataflex-cli"):
            _, command, config, *keys = shlex.split(re.sub(r"\$(\w+)", lambda name: values[name[1]], line))
            found[f"{command} {len(found)}"] = load_config(config, keys, command=command, quiet=True)
    assert list(found) == ["train 0", "score 1", "select 2", "train 3"]
    warm, score, select, large = found.values()
    assert {c.model.model_name_or_path for c in (warm, score, select)} == {values["SMALL"]}
    assert large.model.model_name_or_path == values["LARGE"]
    assert warm.flex.train_type == large.flex.train_type == ("static",)
    assert score.output.resume_path == f"{warm.output.output_dir}/checkpoint-{warm.fixed_steps}"
    assert warm.fixed_steps is not None and warm.fixed_steps % int(warm.output.save_steps) == 0
    assert select.score.select_from == (score.output.output_dir,)
    assert large.data.dataset_dir == f"{select.output.output_dir}/selected"


@pytest.mark.slow
def test_the_commands_of_the_page_run_as_they_stand_there(tmp_path: Path) -> None:
    make_folder(tmp_path)
    keys = yaml.safe_load(YAML) | {"per_device_train_batch_size": 2, "cutoff_len": 64, "deepspeed": "ds_zero2.json"}
    (tmp_path / "small_to_large.yaml").write_text(yaml.safe_dump(keys))
    script = SCRIPT.replace("HuggingFaceTB/SmolLM2-135M", "./small").replace("HuggingFaceTB/SmolLM2-1.7B", "./large")
    script = script.replace("train_step=100 save_steps=100", "train_step=4 save_steps=4").replace("-100", "-4")
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "PYTHONWARNINGS")}
    own = {"PATH": f"{tmp_path / 'bin'}:{kept['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/dataflex-cli").write_text(f'#!/bin/sh\nexec {sys.executable} -m dataflex.cli "$@"\n')
    (tmp_path / "bin/dataflex-cli").chmod(0o755)
    environment = kept | own | {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}

    def run() -> str:
        command = ["bash", "-c", script]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=PATIENCE_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    said = run()
    runs = tmp_path / "runs"
    picked = pd.read_parquet(runs / "chosen/selected/scores.parquet").query("picked")
    assert len(picked) == 3  # 5% of 64
    results = json.loads((runs / "large/all_results.json").read_text())
    cost = json.loads((runs / "chosen/selected/dataflex_selection.json").read_text())["cost"]
    assert results["selection_seconds"] == cost["selection_seconds"] > cost["warmup_seconds"] > 0
    assert results["samples_scored"] == cost["samples_scored"] == 64 + 4
    assert said.count("cost of the selection: ") == 3
    config = yaml.safe_load((runs / "large/config.yaml").read_text())
    assert config["dataset"] == sorted(picked["dataset"].unique())
    again = run()
    assert again.count("is complete") == 2
