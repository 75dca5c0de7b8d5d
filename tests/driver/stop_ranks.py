"""What the ranks of `tests.distributed` run for the tests of stopping: runs that are asked to end, and go on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dataflex.config import load_config
from dataflex.core.hook import Hook
from dataflex.driver import scoring, training
from dataflex.report.trainer_log import read_log
from dataflex.scoring.kept.store import ShardStore
from dataflex.train.trainer.run_hooks import CheckpointHook
from dataflex.utils import dist, stopping
from dataflex.utils.errors import UserError
from dataflex.utils.stopping import Stop, Stopped
from tests.processes import PATIENCE_S


class Signals(Hook):
    """Signals this process before step ``at`` (none: never) on rank ``rank``, and waits until that is noted."""

    def __init__(self, at: int | None, number: int, rank: int, long_saves: bool) -> None:
        self.at, self.number, self.rank, self.long_saves = at, number, rank, long_saves

    def on_step_start(self, run: Any, batch: Any) -> None:
        if run.step + 1 == self.at:
            if self.long_saves:
                run.stop.save_s = 1e6
            if run.rank == self.rank:
                send(run.stop, self.number)


def send(stop: Stop, number: int) -> None:
    assert stop._listener is not None, "signals would end the process here"
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + PATIENCE_S
    while stop._first is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def sweep(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Run each case (flat YAML keys) after the other; what came of it, by name.

    In a case, ``at`` (step), ``number``, ``rank`` and ``long_saves`` say which signal comes when, ``after_shards`` that
    rank 0 gets it in the scoring pass instead, and ``command`` what is run (train).
    """
    return {name: _run(dict(keys)) for name, keys in cases.items()}


def _run(keys: dict[str, Any]) -> dict[str, Any]:
    at, number, rank = keys.pop("at", None), keys.pop("number", signal.SIGTERM), keys.pop("rank", 0)
    shards, command = keys.pop("after_shards", None), keys.pop("command", "train")
    hook, hooks = Signals(at, number, rank, keys.pop("long_saves", False)), training._run_hooks
    training._run_hooks = lambda *args: _before_saves(hooks(*args), hook)
    found: dict[str, Any] = {"stopped": ""}
    try:
        with _signal_after(shards, number):
            {"train": training.train, "score": scoring.score}[command](load_config(keys, quiet=True))
    except Stopped as stopped:
        found["stopped"] = str(stopped)
    except UserError as error:
        found["error"] = str(error)
    finally:
        training._run_hooks = hooks
        dist.barrier()
    return found | _files(Path(keys["output_dir"]))


def _before_saves(hooks: list[Hook], hook: Hook) -> list[Hook]:
    """A hook whose place in the list is the same with and without saves."""
    place = next((i for i, h in enumerate(hooks) if isinstance(h, CheckpointHook)), len(hooks))
    return [*hooks[:place], hook, *hooks[place:]]


@contextmanager
def _signal_after(shards: int | None, number: int) -> Iterator[None]:
    write, seen = ShardStore.write, []

    def counted(store: ShardStore, index: int, arrays: Any) -> None:
        write(store, index, arrays)
        seen.append(index)
        if len(seen) == shards:
            assert stopping._LISTENING
            send(stopping._LISTENING[0].stop, number)

    ShardStore.write = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        ShardStore.write = write  # type: ignore[method-assign]


def _files(folder: Path) -> dict[str, Any]:
    log = folder / "trainer_log.jsonl"
    weights = folder / "adapter_model.safetensors"
    return {
        "files": sorted(path.name for path in folder.iterdir()),
        "losses": [(e["current_steps"], e["loss"]) for e in read_log(folder) if "loss" in e] if log.exists() else [],
        "weights": weights.read_bytes().hex() if weights.exists() else "",
        "decisions": {p.name: json.loads(p.read_text())["indices"] for p in sorted(folder.glob("decisions/*.json"))},
        "scores": len(list(folder.glob("scores/*/scores-*.npy"))),
    }
