"""A selection that is killed in the middle of its scoring pass goes on with the next shard, to the same choice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import ROOT
from tests.driver.workspace import train, write_yaml
from tests.processes import descendants

KEYS: dict[str, Any] = {
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
    """Start a run, SIGKILL its whole process group when ``shards`` shards are done; what the shards on disk are."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    env.pop("PYTHONWARNINGS", None)
    command = [sys.executable, "-m", "dataflex.cli", "train", str(config), "--num_processes=2"]
    process = subprocess.Popen(
        command, env=env, cwd=config.parent, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 120
    try:
        while len(_finished(folder)) < shards:
            assert process.poll() is None and time.monotonic() < deadline, "the run never reached its second shard"
            time.sleep(0.01)
    finally:
        for pid in descendants(process.pid):  # itself first, so that nothing of it can clean up
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    return _finished(folder)


def _finished(folder: Path) -> dict[str, Any]:
    """{shard file of the manifest: [inode, time of its last change]}."""
    found = {}
    for manifest in folder.glob("*/manifest.json"):
        for shard in json.loads(manifest.read_text())["shards"].values():
            for entry in shard["files"].values():
                status = (manifest.parent / entry["file"]).stat()
                found[entry["file"]] = [status.st_ino, status.st_mtime_ns]
    return found


@pytest.mark.parametrize("kept", ["scores", pytest.param("features", marks=pytest.mark.slow)])
def test_a_pass_goes_on_after_its_last_whole_shard(workspace: Path, kept: str) -> None:
    keys = KEYS | {"keep_features": kept == "features"}
    out = {name: workspace / f"{name}_{kept}" for name in ("whole", "killed")}
    config = {name: write_yaml(workspace, f"{name}_{kept}.yaml", **keys, output_dir=str(out[name])) for name in out}
    before = kill_in_mid_pass(config["killed"], out["killed"] / kept)
    assert 2 <= len(before) < 8
    again = train(config["killed"])
    assert again.returncode == 0, again.stdout
    assert f"in 8 shards, {len(before)} of them taken up from" in again.stdout
    after = _finished(out["killed"] / kept)
    assert len(after) == 8 and {name: after[name] for name in before} == before
    assert train(config["whole"]).returncode == 0
    choices = [(folder / "decisions/step_2.json").read_text() for folder in out.values()]
    assert choices[0] == choices[1]
    assert not list(out["killed"].glob(f"{kept}/*/.*"))
