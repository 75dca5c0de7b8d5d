"""Trains with LLaMA-Factory itself, in its own environment: ``python llamafactory_train.py RUNS.json RESULTS.json``.

RUNS.json: {name: the keys of a YAML}. RESULTS.json: {name: what `Watch` saw}. Nothing of dataflex is imported.
"""

from __future__ import annotations

import json
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def without_torchaudio() -> None:
    """Let LLaMA-Factory, which imports torchaudio for audio models, be imported where that is not installed."""
    if "torchaudio" not in sys.modules and find_spec("torchaudio") is None:
        stand_in = sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        stand_in.__spec__ = ModuleSpec("torchaudio", None)


def trained(keys: dict[str, Any]) -> dict[str, Any]:
    """rows: of the training data as its loader has them; rates, losses: of each step."""
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    seen: dict[str, Any] = {"rows": 0, "steps": 0, "rates": [], "losses": []}

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen["rows"] = len(kwargs["train_dataloader"].dataset)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            if "loss" in logs:
                seen["rates"].append(logs["learning_rate"])
                seen["losses"].append(logs["loss"])

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen["steps"] = state.global_step

    run_exp(keys, callbacks=[Watch()])
    return seen


def main() -> None:
    without_torchaudio()
    runs, results = map(Path, sys.argv[1:])
    found = {name: trained(keys) for name, keys in json.loads(runs.read_text()).items()}
    versions = {name: version(name) for name in ("llamafactory", "transformers", "torch")}
    results.write_text(json.dumps({"versions": versions, "runs": found}))


if __name__ == "__main__":
    main()
