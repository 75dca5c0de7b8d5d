"""One engine in a process of its own: `python -m tests.gpu.engine_run DEVICE CASE FOLDER` prints JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

# name: ZeRO stage, dtype, what is offloaded, lora or full
CASES: dict[str, tuple[int, torch.dtype, str, str]] = {
    "zero 0": (0, torch.float32, "", "full"),
    "zero 1 bf16": (1, torch.bfloat16, "", "lora"),
    "zero 2 fp16": (2, torch.float16, "", "full"),
    "zero 3": (3, torch.float32, "", "lora"),
    "zero 3 bf16 offloaded": (3, torch.bfloat16, "optimizer param", "full"),
}
STEPS, POOL = 6, 5


def config_of(stage: int, dtype: torch.dtype, offload: str) -> dict[str, Any]:
    from tests import tiny_engine as tiny

    config = tiny.ds_config(stage, micro_batch=4)
    config["zero_optimization"] |= {f"offload_{what}": {"device": "cpu"} for what in offload.split()}
    config["optimizer"]["params"]["lr"] = 1e-2
    if dtype is torch.bfloat16:
        config["bf16"] = {"enabled": True}
    if dtype is torch.float16:
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
    return config


def engine_of(case: tuple[int, torch.dtype, str, str]) -> Any:
    import dataflex
    from tests import tiny_engine as tiny

    stage, dtype, offload, kind = case
    return dataflex.initialize(
        model=tiny.model(kind, dtype),
        config=config_of(stage, dtype, offload),
        dataflex={"train_step": STEPS, "scoring_batch_tokens": 60},
        train_dataset=tiny.samples(8, seed=9),
        tokenizer=tiny.PadZero(),
    )


def losses_until(engine: Any, folder: Path | None) -> list[float]:
    """Train to the end; with ``folder`` a checkpoint is written after three steps."""
    losses = []
    for batch in engine.batches():
        losses.append(float(engine.training_step(batch)))
        if folder is not None and len(losses) == 3:
            engine.save_checkpoint(folder)
    return losses


def verdicts_of(engine: Any) -> list[str]:
    """The self-check of the features, plain and with Adam's moments: against autograd, and that nothing changed."""
    from dataflex.scoring.checks.self_check import check_scoring
    from dataflex.scoring.gradients.layers import LayerRule
    from dataflex.scoring.gradients.spec import FeatureSpec
    from tests import tiny_engine as tiny

    rule = LayerRule.of(["layers.0", "last:1"], None)
    ids, found = np.arange(POOL, dtype=np.int64), []
    for adam in (None, "adam_less"):
        spec = FeatureSpec(adam=adam, proj_dim=512, layers=rule)
        found += [verdict.line for verdict in check_scoring(engine.scorer, tiny.samples(POOL, seed=5), ids, spec)]
    return found


def main(device: str, name: str, folder: str) -> None:
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from process_group import end_process, start_process

    start_process()
    from dataflex.ops.native import _ext

    case = CASES[name]
    engine = engine_of(case)
    losses = losses_until(engine, Path(folder))
    verdicts = verdicts_of(engine)
    again = engine_of(case)
    again.load_checkpoint(folder)
    found = {
        "native": isinstance(_ext.load("cuda" if device == "cuda" else "cpu"), _ext.Loaded),
        "losses": losses,
        "again": losses_until(again, None),
        "verdicts": verdicts,
    }
    end_process()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
