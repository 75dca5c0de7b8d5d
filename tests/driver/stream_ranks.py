"""What the ranks of `tests.distributed` run for the tests of streams: whole runs, and runs that go on from a step."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from dataflex.config import load_config
from dataflex.core.hook import Hook
from dataflex.driver import training
from dataflex.report.trainer_log import read_log
from dataflex.utils import dist
from dataflex.utils.errors import UserError


class Batches(Hook):
    """Keeps the ids and the token ids of each global batch, of all ranks, and where the streams' chunks begin."""

    def __init__(self) -> None:
        self.starts: list[list[int]] = []
        self.ids: list[list[int]] = []
        self.tokens: list[list[list[int]]] = []

    def on_train_start(self, run: Any) -> None:
        self.starts.append([stream.start for stream in run.pool.streams])

    def on_step_end(self, run: Any, batch: Any) -> None:
        self.starts.append([stream.start for stream in run.pool.streams])

    def on_step_start(self, run: Any, batch: Any) -> None:
        mine = []
        for micro in batch.micro_batches:
            rows = zip(micro.inputs["input_ids"], micro.inputs["attention_mask"], strict=True)
            mine += [ids[mask.bool()].tolist() for ids, mask in rows]
        self.ids.append(batch.sample_ids.tolist())
        self.tokens.append(sorted(row for part in dist.gather_objects(mine) for row in part))


def whole_and_resumed(folder: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each case (flat YAML keys with save_steps) trained from step 0, and again from its first checkpoint on.

    On two ranks `odm` also from that of the one rank that has run before.
    """
    found = {}
    for name, keys in cases.items():
        where = Path(folder) / f"{name}-{dist.world_size()}"
        whole = _train(keys | {"output_dir": str(where)})
        start = where / f"checkpoint-{keys['save_steps']}"
        resumed = _train(keys | {"output_dir": f"{where}-resumed", "resume_from_checkpoint": str(start)})
        found[name] = {"whole": whole, "resumed": resumed}
        other = Path(folder) / f"{name}-1" / start.name
        if dist.world_size() == 2 and name == "odm":
            again = {"output_dir": f"{where}-other", "resume_from_checkpoint": str(other)}
            found[name]["other"] = _train(keys | again)
    return found


def _train(keys: dict[str, Any]) -> dict[str, Any]:
    batches, hooks = Batches(), training._run_hooks
    training._run_hooks = lambda *args: [*hooks(*args), batches]
    try:
        training.train(load_config(keys, quiet=True))
    finally:
        training._run_hooks = hooks
    folder = Path(keys["output_dir"])
    weights = sorted(folder.glob("*.safetensors"))[0].read_bytes()
    mixtures = [path.read_text() for path in folder.glob("*_weights.jsonl")]
    return {
        "ids": batches.ids,
        "tokens": batches.tokens,
        "starts": batches.starts,
        "losses": [entry["loss"] for entry in read_log(folder) if "loss" in entry],
        "weights": hashlib.sha256(weights).hexdigest(),
        "mixtures": mixtures,
    }


def stopped_together(folder: str, keys: dict[str, Any]) -> dict[str, Any]:
    """The error that this rank ends with, and the step that it is at."""
    steps: list[int] = []
    hooks = training._run_hooks
    seen = Hook()
    seen.on_step_end = lambda run, batch: steps.append(run.step)  # type: ignore[method-assign]
    training._run_hooks = lambda *args: [*hooks(*args), seen]
    try:
        training.train(load_config(keys, quiet=True))
    except UserError as error:
        return {"error": str(error), "steps": steps}
    finally:
        training._run_hooks = hooks
        dist.barrier()
    return {}


def everything(folder: str, cases: dict[str, dict[str, Any]], broken: dict[str, Any]) -> dict[str, Any]:
    """`whole_and_resumed`, and `stopped_together`."""
    return {"runs": whole_and_resumed(folder, cases), "stopped": stopped_together(folder, broken)}
