"""What dataflex costs per training step, against a plain DeepSpeed loop of the same model, batch and stage.

    python benchmarks/bench_step.py [--stage 0] [--processes 1] [--rounds 40] [--csv FILE]

The plain loop is `loss = engine(**batch).loss; engine.backward(loss); engine.step()` over the same DataLoader.
All variants live in one process and take turns, step by step; the figure is the median of the ratios of
steps that ran next to each other. Before timing, the losses of the variants are compared.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, TOKENS, MICRO_BATCH = 8192, 256, 4
VARIANTS: dict[str, dict[str, Any]] = {
    "static": {},
    "loss weighting": {"train_type": "dynamic_weight", "component_name": "loss"},
    "adapt_softmax weighting": {"train_type": "dynamic_weight", "component_name": "adapt_softmax"},
    "weighted sampling": {"sampling": "inverse_domain", "sampling_correction": True},
    "random mixing": {"train_type": "dynamic_mix", "component_name": "random", "update_step": 10},
    "odm": {"train_type": "dynamic_mix", "component_name": "odm", "update_step": 1},
    "doremi, stored reference losses": {"train_type": "dynamic_mix", "component_name": "doremi", "update_step": 10},
}


def samples(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Random samples of TOKENS tokens, the first quarter of which is not trained on."""
    draw = np.random.default_rng(seed)
    rows = draw.integers(1, VOCABULARY, (count, TOKENS)).tolist()
    return [{"input_ids": row, "labels": [-100] * (TOKENS // 4) + row[TOKENS // 4 :]} for row in rows]


def model() -> Any:
    """A Llama with 8.4 million parameters, the same weights each time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def ds_config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "steps_per_print": 2**31,
    }


def by_domain(pool: list[Any]) -> dict[str, list[Any]]:
    return {"a": pool[::2], "b": pool[1::2]}


def stored_losses(pool: list[Any], folder: str) -> None:
    """A store of random reference losses for the samples of ``by_domain(pool)``, made by rank 0."""
    from dataflex.data.pool import Pool
    from dataflex.scoring.kept.store import ShardStore
    from dataflex.scoring.kept.token_losses import POOL
    from dataflex.utils import dist

    if dist.is_main():
        whole = Pool.from_datasets(by_domain(pool))
        store = ShardStore(Path(folder), {POOL: whole.fingerprint}, np.arange(len(whole)), len(whole))
        values = np.random.default_rng(0).uniform(0, 20, len(whole) * TOKENS).astype(np.float32)
        store.resume()
        store.write(0, {"values": values, "offsets": np.arange(len(whole) + 1) * TOKENS})
    dist.barrier()


def plain_steps(stage: int, pool: list[Any]) -> Iterator[float]:
    """Endless steps of a plain DeepSpeed loop; yields seconds."""
    import deepspeed
    import torch
    from torch.utils.data import DataLoader, DistributedSampler

    from dataflex.data.encoding.collate import Collator

    net = model()
    engine, *_ = deepspeed.initialize(model=net, config=ds_config(stage), model_parameters=net.parameters())
    sampler: Any = DistributedSampler(pool, shuffle=True, seed=0)  # type: ignore[arg-type, var-annotated]
    generator = torch.Generator()
    loader = DataLoader(pool, MICRO_BATCH, sampler=sampler, collate_fn=Collator(0), generator=generator)  # type: ignore[arg-type, var-annotated]
    while True:
        batches = iter(loader)
        for _ in range(len(loader)):
            started = time.perf_counter()
            batch = {k: v.to(engine.device) for k, v in next(batches).items()}
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            loss.item()
            yield time.perf_counter() - started


def dataflex_steps(stage: int, pool: list[Any], flex: dict[str, Any]) -> Iterator[float]:
    """Steps of the same loop through dataflex; yields seconds, the loading of the batch included."""
    import dataflex
    from dataflex.data.encoding.collate import Collator

    engine = dataflex.initialize(
        model=model(),
        config=ds_config(stage),
        train_dataset=by_domain(pool),
        eval_dataset=pool[:64],
        data_collator=Collator(0),
        dataflex={**flex, "train_step": 10_000},
    )
    batches = engine.batches()
    while True:
        started = time.perf_counter()
        engine.training_step(next(batches))
        yield time.perf_counter() - started


def check_equal_losses(stage: int, pool: list[Any]) -> float:
    """Largest difference between the plain loop's loss and dataflex's on the same batches."""
    import deepspeed
    import torch

    import dataflex
    from dataflex.data.encoding.collate import Collator

    net = model()
    plain, *_ = deepspeed.initialize(model=net, config=ds_config(stage), model_parameters=net.parameters())
    ours = dataflex.initialize(
        model=model(),
        config=ds_config(stage),
        train_dataset=pool,
        data_collator=Collator(0),
        dataflex={"train_step": 5},
    )
    worst = 0.0
    for step in ours.batches():
        (micro,) = step.micro_batches
        loss = plain(**micro.inputs, labels=micro.raw_labels).loss
        plain.backward(loss)
        plain.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        worst = max(worst, abs(float(mean) / ours.run.world_size - ours.training_step(step)))
    return worst


def measure(stage: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table: one per variant."""
    from dataflex.utils import dist

    pool = samples(512, seed=1)
    difference = check_equal_losses(stage, pool)
    assert difference < 1e-4, f"losses differ by {difference}"
    runs = {"plain DeepSpeed": plain_steps(stage, pool)}
    with tempfile.TemporaryDirectory() as made:
        folder = dist.broadcast_object(made)
        stored_losses(pool, folder)
        for name, flex in VARIANTS.items():
            reference = {"reference_model_path": folder} if flex.get("component_name") == "doremi" else {}
            runs[name] = dataflex_steps(stage, pool, {**flex, **reference})
        return taking_turns(runs, stage, rounds, difference)


def taking_turns(runs: dict[str, Iterator[float]], stage: int, rounds: int, difference: float) -> list[dict[str, Any]]:
    """Time the variants step by step in turn."""
    for steps in runs.values():
        for _ in range(3):
            next(steps)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(next(runs[name]))
    base = times["plain DeepSpeed"]
    rows = []
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, base, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "variant": name,
                "zero_stage": stage,
                "median_ms": round(1e3 * statistics.median(seconds), 2),
                "ratio_to_plain": round(statistics.median(ratios), 4),
                "ratio_quartiles": f"{low:.4f}-{high:.4f}",
                "loss_difference": f"{difference:.1e}",
            }
        )
    return rows


def describe_machine(processes: int) -> dict[str, str]:
    import torch

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else cpu_name()
    packages = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    return {"hardware": f"{name}, {os.cpu_count()} cores", "processes": str(processes), **packages}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def worker(arguments: argparse.Namespace) -> None:
    import logging

    import deepspeed
    import deepspeed.ops
    import torch
    from deepspeed.utils import logger as deepspeed_logger

    from dataflex.utils.logging import logger

    deepspeed_logger.setLevel(logging.WARNING)
    logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // arguments.processes))
    deepspeed.init_distributed(verbose=False)
    rows = measure(arguments.stage, arguments.rounds)
    if int(os.environ["RANK"]) == 0:
        machine = describe_machine(arguments.processes)
        print(" | ".join(f"{k} {v}" for k, v in machine.items()))
        for row in rows:
            print("  ".join(f"{k}={v}" for k, v in row.items()))
        if arguments.csv:
            write_csv(Path(arguments.csv), [row | machine for row in rows])
    torch.distributed.destroy_process_group()


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append the rows; the header comes with a new file."""
    is_new = not path.exists()
    with path.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def start(processes: int) -> int:
    """Start this script once per rank and wait."""
    from dataflex.launcher import free_port

    if shutil.which("nvidia-smi") is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONWARNINGS": "ignore"}
    ranks = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        ranks.append(subprocess.Popen([sys.executable, *sys.argv], env=os.environ | place | meet))
    return max(process.wait() for process in ranks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--stage", type=int, default=0, choices=(0, 1, 2, 3))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--csv", default="")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        return start(arguments.processes)
    worker(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
