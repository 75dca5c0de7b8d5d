"""Runs a test function in several processes over gloo, as training does, and brings back what it returns."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dataflex.launcher import free_port

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(target: str, world_size: int, timeout_s: int = 240, **arguments: Any) -> list[Any]:
    """Call ``module:function(**arguments)`` on each rank of a process group; return the ranks' results.

    Arguments and results are JSON. Fails with the ranks' output if one of them fails or hangs.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _start(target, rank, world_size, port, folder, arguments)
            for port in [free_port()]
            for rank in range(world_size)
        ]
        outputs = []
        try:
            for process in processes:
                outputs.append(process.communicate(timeout=timeout_s)[0])
        except subprocess.TimeoutExpired as exc:
            raise AssertionError(f"{target} hung on {world_size} ranks") from exc
        finally:
            for process in processes:
                process.kill()
        failed = [f"rank {r}:\n{out}" for r, out in enumerate(outputs) if processes[r].returncode != 0]
        assert not failed, f"{target} failed\n" + "\n".join(failed)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]


def _start(
    target: str, rank: int, world_size: int, port: int, folder: str, arguments: dict[str, Any]
) -> subprocess.Popen[str]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "tests.distributed", target, folder, json.dumps(arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def _main() -> None:
    """One rank. DeepSpeed collects garbage at every start of ZeRO-3: what is imported is left out of that."""
    target, folder, arguments = sys.argv[1:]
    import deepspeed
    import deepspeed.ops
    import torch

    from dataflex.worker import leave

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    module, function = target.split(":")
    call = getattr(importlib.import_module(module), function)
    gc.freeze()
    result = call(**json.loads(arguments))
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    _main()
