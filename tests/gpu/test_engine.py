"""The engine on one device: ZeRO 0 to 3, offload, bf16 and fp16, checkpoint and resume, features against autograd."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.engine_run import CASES
from tests.processes import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", CASES)
def test_an_engine_trains_scores_and_goes_on(name: str, device: torch.device, tmp_path: Path) -> None:
    if device.type == "cpu" and CASES[name][1] is torch.float16:
        pytest.skip("DeepSpeed trains no float16 on a CPU")
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")}
    env = kept | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.gpu.engine_run", device.type, name, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["native"], "the ops run natively"
    assert found["losses"][0] > found["losses"][-1] > 0, "it learns"
    assert found["again"] == found["losses"][3:], "a resumed run goes on with the same losses"
    assert len(found["verdicts"]) == 10 and all(line.startswith("ok") for line in found["verdicts"]), found["verdicts"]
