"""Does a weighter help where labels are wrong? Target loss after training on data with shuffled answers.

    python benchmarks/weighting_table.py --data DIR [--csv FILE] [--seeds 3] [--steps 200] [--rows 1000]

DIR is a dataset_dir with gsm8k_train and gsm8k_val (instruction, output). 30% of the training answers are
shuffled between their rows. A small Llama of bytes is trained from scratch; half of gsm8k_val are adapt's anchors,
the loss is that of the other half. Every run is a row of the CSV, and runs that it holds are not repeated; the
table at the end has the mean and the standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_step import cpu_name, write_csv
from process_group import start_process

SHUFFLED, MICRO, ACCUMULATION = 0.3, 16, 1
WIDTH, LAYERS, TOKENS, RATE = 96, 3, 320, 3e-3
SOFTMAX = {"weight": "softmax", "refresh_step": 25, "temperature": 0.02}
VARIANTS: dict[str, dict[str, Any]] = {
    "loss uniform": {"name": "loss", "params": {"strategy": "uniform"}},
    "loss linupper": {"name": "loss", "params": {"strategy": "linupper"}},
    "loss quadratic": {"name": "loss", "params": {"strategy": "quadratic"}},
    "loss extremes": {"name": "loss", "params": {"strategy": "extremes"}},
    "adapt": {"name": "adapt", "params": {"refresh_step": 25}},
    "adapt_softmax mean": {"name": "adapt", "params": {"similarity": "mean", **SOFTMAX}},
    "adapt_softmax max": {"name": "adapt", "params": {"similarity": "max", **SOFTMAX}},
}


def shuffled_rows(rows: list[dict[str, Any]], seed: int) -> tuple[list[dict[str, Any]], set[int]]:
    """The rows with SHUFFLED of their outputs passed on in a ring, and which those are."""
    draw = np.random.default_rng([seed, 30])
    ring = draw.permutation(len(rows))[: round(SHUFFLED * len(rows))].tolist()
    made = [dict(row) for row in rows]
    for here, there in zip(ring, ring[1:] + ring[:1], strict=True):
        made[here]["output"] = rows[there]["output"]
    return made, set(ring)


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    entry = json.loads((folder / "dataset_info.json").read_text())[name]
    rows: list[dict[str, Any]] = json.loads((folder / entry["file_name"]).read_text())
    return rows


def load(rows: dict[str, list[dict[str, Any]]], tokenizer: Any) -> dict[str, Any]:
    """{name: pool} of alpaca rows."""
    from dataflex.config import load_config
    from dataflex.data.load import load_pool

    with tempfile.TemporaryDirectory() as folder:
        info = {}
        for name, part in rows.items():
            Path(folder, f"{name}.json").write_text(json.dumps(part))
            info[name] = {"file_name": f"{name}.json"}
        Path(folder, "dataset_info.json").write_text(json.dumps(info))
        keys = {"dataset_dir": folder, "template": "default", "cutoff_len": TOKENS}
        cfg = load_config(keys, embedded=True, quiet=True)
        return {name: load_pool(cfg, tokenizer, [name], "dataset") for name in rows}


def model(tokenizer: Any, seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=WIDTH * 2,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def one_run(variant: str, seed: int, arguments: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Train once; the row of the CSV."""
    import dataflex
    from dataflex.core.hook import Hook

    rows, wrong = shuffled_rows(read(arguments.data, "gsm8k_train")[: arguments.rows], seed)
    held = read(arguments.data, "gsm8k_val")
    pools = load({"train": rows, "anchors": held[::2], "test": held[1::2]}, tokenizer)
    assert len(pools["train"]) == len(rows), "a row was dropped, so rows and sample ids differ"

    class Shares(Hook):
        """Mean weight of shuffled and of right rows in the second half of the run."""

        def __init__(self) -> None:
            self.sums = np.zeros((2, 2))

        def on_weights(self, run: Any, micro: Any, weights: Any) -> None:
            if run.step >= run.total_steps // 2:
                for i, sample in enumerate(micro.sample_ids.tolist()):
                    self.sums[int(sample in wrong)] += (1.0 if weights is None else float(weights[i]), 1)

    shares = Shares()
    flex: dict[str, Any] = {"train_step": arguments.steps, "seed": seed, "weight_normalization": "mean"}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "components.yaml").write_text(json.dumps({"weighters": {"tried": VARIANTS[variant]}}))
        flex |= {
            "train_type": "dynamic_weight",
            "component_name": "tried",
            "components_cfg_file": f"{folder}/components.yaml",
            "warmup_step": arguments.steps // 10,
        }
        engine = dataflex.initialize(
            model=model(tokenizer, seed),
            config={
                "train_micro_batch_size_per_gpu": MICRO,
                "gradient_accumulation_steps": ACCUMULATION,
                "zero_optimization": {"stage": 0},
                "optimizer": {"type": "AdamW", "params": {"lr": RATE, "torch_adam": True}},
                "gradient_clipping": 1.0,
                "steps_per_print": 2**31,
            },
            train_dataset=pools["train"],
            eval_dataset=pools["anchors"],
            tokenizer=tokenizer,
            dataflex=flex,
            hooks=[shares],
        )
        for batch in engine.batches():
            engine.training_step(batch)
    losses, counts = engine.scorer.losses(pools["test"], reduction="sum")
    (right_sum, right), (wrong_sum, wrongly) = shares.sums.tolist()
    ratio = (wrong_sum / wrongly) / (right_sum / right) if right and wrongly else float("nan")
    return {
        "variant": variant,
        "seed": seed,
        "target_loss": round(float(losses.sum(dtype=np.float64) / counts.sum(dtype=np.float64)), 5),
        "weight_of_shuffled_to_right": round(ratio, 4),
        "steps": arguments.steps,
        "rows": arguments.rows,
    }


def finished(path: Path, arguments: argparse.Namespace) -> dict[tuple[str, int], dict[str, str]]:
    import csv

    if not path.exists():
        return {}
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    same = [r for r in rows if (r["steps"], r["rows"]) == (str(arguments.steps), str(arguments.rows))]
    return {(row["variant"], int(row["seed"])): row for row in same}


def table(rows: dict[tuple[str, int], dict[str, str]]) -> str:
    lines = ["| variant | target loss | weight of shuffled / of right rows | seeds |", "| --- | --- | --- | --- |"]
    for variant in VARIANTS:
        mine = [row for (name, _), row in rows.items() if name == variant]
        if mine:
            losses = np.array([float(row["target_loss"]) for row in mine])
            ratios = np.array([float(row["weight_of_shuffled_to_right"]) for row in mine])
            spread = losses.std(ddof=1) if len(mine) > 1 else float("nan")
            lines.append(f"| {variant} | {losses.mean():.4f} ± {spread:.4f} | {ratios.mean():.3f} | {len(mine)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--csv", type=Path, default=Path("weighting_table.csv"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=1000)
    arguments = parser.parse_args()
    from dataflex.demo.byte_tokenizer import byte_tokenizer

    start_process()
    tokenizer = byte_tokenizer()
    packages = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    for seed in range(arguments.seeds):
        for variant in VARIANTS:
            if (variant, seed) not in finished(arguments.csv, arguments):
                row = one_run(variant, seed, arguments, tokenizer)
                print(row, flush=True)
                write_csv(arguments.csv, [row | {"hardware": cpu_name(), **packages}])
    print(table(finished(arguments.csv, arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
