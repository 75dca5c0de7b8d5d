"""Runs a test function in several processes over gloo, as training does, and brings back what it returns.

The processes are forked from a server that has imported what they need (tests/warmed.py): that takes seconds.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dataflex.launcher import free_port
from tests.processes import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
# Of the server, before it imports anything.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def run_ranks(target: str, world_size: int, timeout_s: int = PATIENCE_S, **arguments: Any) -> list[Any]:
    """Call ``module:function(**arguments)`` on each rank of a process group; return the ranks' results.

    Arguments and results are JSON. Fails with the ranks' output if one of them fails or hangs.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks: list[BaseProcess] = []
        try:
            ranks += forked_ranks(_rank, world_size, folder, target, json.dumps(arguments))
            hung = not _joined(ranks, timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        outputs = [f"rank {rank}:\n{_output(folder, rank).read_text()}" for rank in range(world_size)]
        assert not hung, f"{target} hung on {world_size} ranks\n" + "\n".join(outputs)
        failed = [outputs[rank] for rank, process in enumerate(ranks) if process.exitcode != 0]
        assert not failed, f"{target} failed\n" + "\n".join(failed)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]


def forked_ranks(body: Callable[..., None], world_size: int, folder: str, *arguments: str) -> list[BaseProcess]:
    """Start ``body(*arguments)`` on each rank, with the variables that a launcher sets; all imports are done.

    What rank r prints goes to ``folder``/r.txt.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.warmed"])
    port = free_port()
    ranks = [
        server.Process(target=_forked, args=(body, rank, world_size, port, folder, arguments))
        for rank in range(world_size)
    ]
    with _environment():
        for process in ranks:
            process.start()
    return ranks


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """The server takes its environment from the process that starts the first rank."""
    before = dict(os.environ)
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _joined(processes: list[BaseProcess], timeout_s: float) -> bool:
    """Wait until all have ended; False if one still runs after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return all(process.exitcode is not None for process in processes)


def _output(folder: str, rank: int) -> Path:
    return Path(folder, f"{rank}.txt")


def _forked(
    body: Callable[..., None], rank: int, world_size: int, port: int, folder: str, arguments: tuple[str, ...]
) -> None:
    """One rank, without what DeepSpeed does for the memory and the profiler of a GPU: a third of ZeRO-3's time here."""
    output = os.open(_output(folder, rank), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "LOCAL_SIZE": world_size,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    import deepspeed.runtime.engine
    import deepspeed.runtime.zero.utils
    import deepspeed.utils.nvtx
    import torch

    from dataflex.worker import leave

    deepspeed.utils.nvtx.enable_nvtx = False
    for module in (deepspeed.runtime.engine, deepspeed.runtime.zero.utils):
        module.gc = SimpleNamespace(collect=int)  # at every start and behind every pass; Python does it often enough
    torch.set_num_threads(1)
    gc.freeze()
    try:
        body(folder, rank, *arguments)
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)


def _rank(folder: str, rank: int, target: str, arguments: str) -> None:
    Path(folder, f"{rank}.json").write_text(json.dumps(_call(target, json.loads(arguments))))


def _call(target: str, arguments: dict[str, Any]) -> Any:
    import deepspeed
    import torch

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    module, function = target.split(":")
    result = getattr(importlib.import_module(module), function)(**arguments)
    if torch.distributed.is_initialized():  # a script may have ended it
        torch.distributed.destroy_process_group()
    return result
