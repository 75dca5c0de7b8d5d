"""A selection that is killed in the middle of its scoring pass goes on with the next shard, to the same choice."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import PATIENCE_S
from tests.driver.forked_runs import ForkedRun
from tests.driver.workspace import ZERO3, small, write_yaml

KEYS: dict[str, Any] = {
    "deepspeed": ZERO3,
    "eval_dataset": ["target"],
    "train_type": "dynamic_select",
    "component_name": "less",
    "warmup_step": 2,
    "update_step": 2,
    "update_times": 1,
    "max_steps": None,
    "save_steps": 2,
    "score_shard_samples": 8,
    "scoring_batch_tokens": 96,
}


def kill_in_mid_pass(config: Path, folder: Path, shards: int = 2) -> dict[str, Any]:
    """Start a run, SIGKILL its ranks when ``shards`` shards are done; what the shards on disk are."""
    run = ForkedRun(["train", str(config)], 2)
    deadline = time.monotonic() + PATIENCE_S
    try:
        while len(_finished(folder)) < shards:
            assert run.poll() is None and time.monotonic() < deadline, f"no second shard\n{run.output()}"
            time.sleep(0.01)
    finally:
        run.kill()
    return _finished(folder)


def _train(config: Path) -> str:
    run = ForkedRun(["train", str(config)], 2)
    text = run.end(PATIENCE_S)
    assert run.returncode == 0, text
    return text


def _finished(folder: Path) -> dict[str, Any]:
    """{shard file of the manifest: [inode, time of its last change]}."""
    found = {}
    for manifest in folder.glob("*/manifest.json"):
        for shard in json.loads(manifest.read_text())["shards"].values():
            for entry in shard["files"].values():
                status = (manifest.parent / entry["file"]).stat()
                found[entry["file"]] = [status.st_ino, status.st_mtime_ns]
    return found


SLOW = [pytest.param(kept, marks=pytest.mark.slow) for kept in ("scores", "embeddings")]


@pytest.mark.parametrize("kept", [*SLOW, "features"])
def test_a_pass_goes_on_after_its_last_whole_shard(workspace: Path, kept: str) -> None:
    keys = KEYS | {"keep_features": kept == "features", "component_name": "rds" if kept == "embeddings" else "less"}
    out = {name: workspace / f"{name}_{kept}" for name in ("whole", "killed")}
    keys |= small(workspace)
    config = {name: write_yaml(workspace, f"{name}_{kept}.yaml", **keys, output_dir=str(out[name])) for name in out}
    before = kill_in_mid_pass(config["killed"], out["killed"] / kept)
    assert 2 <= len(before) < 8
    assert f"in 8 shards, {len(before)} of them taken up from" in _train(config["killed"])
    after = _finished(out["killed"] / kept)
    assert len(after) == 8 and {name: after[name] for name in before} == before
    _train(config["whole"])
    choices = [(folder / "decisions/step_2.json").read_text() for folder in out.values()]
    assert choices[0] == choices[1]
    assert not list(out["killed"].glob(f"{kept}/*/.*"))
