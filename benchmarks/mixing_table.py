"""What mixers do to each domain's perplexity after the same number of tokens, and how their mixtures move.

    python benchmarks/mixing_table.py --data FOLDER [--steps 150] [--seeds 0 1 2] [--name mixing]

Four text domains (c4, wiki, gsm8k, alpaca), read as bytes and cut into blocks; every tenth block is held out, up to 96.
A small Llama from scratch, one process. `doremi` is a final run on the weights that its proxy found, which had a
reference run before it: two more runs of the same length, whose tokens are not counted. Started again, it goes on with
the runs that are missing. Writes results/<name>.csv, results/<name>_steps.csv and results/<name>.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from process_group import start_process

RESULTS = Path(__file__).parent / "results"
TOKENS, BATCH, VOCABULARY, HELD_OUT = 128, 16, 259, 96
MIXERS = ("stratified", "uniform", "doremi", "odm")
WARMUP = 10
Blocks = dict[str, list[dict[str, Any]]]


def texts(folder: Path) -> dict[str, list[str]]:
    """The documents of each domain: web, encyclopedia, maths questions with answers, instructions with answers."""

    def lines(name: str) -> list[str]:
        return [json.loads(line)["text"] for line in (folder / name).read_text(encoding="utf-8").splitlines()]

    def answered(name: str) -> list[str]:
        rows = json.loads((folder / name).read_text(encoding="utf-8"))
        return ["\n".join(row[k] for k in ("instruction", "input", "output") if row.get(k)) for row in rows]

    return {
        "c4": lines("c4_demo.jsonl"),
        "wiki": lines("wiki_demo.jsonl"),
        "gsm8k": answered("gsm8k_train_1k.json"),
        "alpaca": answered("alpaca_en_demo.json"),
    }


def blocks(folder: Path) -> tuple[Blocks, Blocks]:
    """Training and held-out blocks of TOKENS bytes, an end token after each document."""
    train: Blocks = {}
    held_out: Blocks = {}
    for name, documents in texts(folder).items():
        stream = np.concatenate([[*(byte + 3 for byte in text.encode()), 2] for text in documents])
        rows = stream[: len(stream) // TOKENS * TOKENS].reshape(-1, TOKENS).tolist()
        samples = [{"input_ids": row, "labels": row} for row in rows]
        held_out[name] = samples[9::10][:HELD_OUT]
        train[name] = [sample for at, sample in enumerate(samples) if at % 10 != 9]
    return train, held_out


def model(seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class Runs:
    """Trains on the same blocks, with one seed and mixer after the other."""

    def __init__(self, train: Blocks, held_out: Blocks, steps: int) -> None:
        from dataflex.data.pool import Pool

        self.pool, self.held_out, self.steps = Pool.from_datasets(train), Pool.from_datasets(held_out), steps

    def train(self, seed: int, folder: Path, keys: dict[str, Any], params: dict[str, Any] | None = None) -> Any:
        """A trained engine; ``keys`` and ``params`` say how it mixes."""
        import yaml

        import dataflex
        from dataflex.data.encoding.collate import Collator

        if params is not None:
            path = folder / "components.yaml"
            path.parent.mkdir(parents=True)
            path.write_text(yaml.safe_dump({"mixers": {keys["component_name"]: {"params": params}}}))
            keys = {**keys, "components_cfg_file": str(path)}
        engine = dataflex.initialize(
            model=model(seed),
            config={
                "train_micro_batch_size_per_gpu": BATCH,
                "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
                "gradient_clipping": 1.0,
                "steps_per_print": 2**31,
            },
            train_dataset=self.pool,
            eval_dataset=self.held_out,
            data_collator=Collator(0),
            dataflex={
                "train_type": "dynamic_mix",
                "seed": seed,
                "output_dir": str(folder),
                "train_step": self.steps,
                "warn_domain_epochs": 100.0,
                **keys,
            },
        )
        for batch in engine.batches():
            engine.training_step(batch)
        return engine

    def of(self, mixer: str, seed: int, folder: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Held-out perplexity by domain, and the mixture over the steps."""
        names = self.pool.domain_names
        if mixer == "doremi":
            shares, moved = self._doremi(seed, folder)
            engine = self.train(seed, folder / "final", {"static_mix": True, "init_mixture_proportions": shares})
        elif mixer == "odm":
            keys = {"component_name": "odm", "update_step": 1, "warmup_step": WARMUP}
            engine = self.train(seed, folder, keys, {"alpha": 0.9})
            moved = [(line["step"], [line["weights"][n] for n in names]) for line in read(folder / "odm_weights.jsonl")]
        else:
            engine = self.train(seed, folder, {"mixture_sample_rule": mixer})
            moved = [(0, engine._loop.planner.manager.proportions.tolist())]
            moved.append((self.steps, moved[0][1]))
        losses = engine.evaluate()
        perplexity = {name: float(np.exp(losses[f"eval_{name}_loss"])) for name in names}
        rows = [
            {"mixer": mixer, "seed": seed, "step": step, **dict(zip(names, np.round(values, 5).tolist(), strict=True))}
            for step, values in moved
        ]
        return perplexity, rows

    def _doremi(self, seed: int, folder: Path) -> tuple[list[float], list[tuple[int, list[float]]]]:
        """Reference and proxy run: the mean weights, and those of each step."""
        reference = self.train(seed, folder / "reference", {"mixture_sample_rule": "uniform"})
        reference.module.save_pretrained(folder / "frozen")
        keys = {"component_name": "doremi", "update_step": 1}
        params = {"reference_model_path": str(folder / "frozen"), "reweight_eta": 1.0, "reweight_eps": 1e-3}
        self.train(seed, folder / "proxy", keys, params)
        lines = read(folder / "proxy" / "doremi_weights.jsonl")
        return lines[-1]["average_weights"], [(line["step"], line["domain_weights"]) for line in lines]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows; the header comes with a new file."""
    rows = list(rows)
    is_new = not path.exists()
    with path.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict[str, str]], domains: list[str]) -> str:
    """Markdown: mean and standard deviation over seeds, and the mean over domains."""
    columns = [*domains, "mean"]
    found: dict[str, list[list[float]]] = defaultdict(list)
    for row in rows:
        values = [float(row[d]) for d in domains]
        found[row["mixer"]].append([*values, statistics.mean(values)])
    lines = [f"| mixer | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for mixer, values in found.items():
        cells = [
            f"{statistics.mean(c):.3f} ± {statistics.stdev(c) if len(c) > 1 else 0:.3f}"
            for c in zip(*values, strict=True)
        ]
        lines.append(f"| {mixer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(steps: list[dict[str, str]], domains: list[str], path: Path) -> None:
    """The mixtures of the first seed over the steps, one panel for each mixer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mixers = list(dict.fromkeys(row["mixer"] for row in steps))
    figure = Figure(figsize=(3.2 * len(mixers), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(mixers), sharey=True, squeeze=False)[0]
    for axes, mixer in zip(panels, mixers, strict=True):
        mine = [row for row in steps if row["mixer"] == mixer and row["seed"] == "0"]
        for domain in domains:
            axes.plot([int(r["step"]) for r in mine], [float(r[domain]) for r in mine], label=domain)
        axes.set_title("doremi: weights of the proxy" if mixer == "doremi" else mixer)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of the domain")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default="mixing")
    arguments = parser.parse_args()
    start_process()
    results, moves = RESULTS / f"{arguments.name}.csv", RESULTS / f"{arguments.name}_steps.csv"
    runs = Runs(*blocks(arguments.data), arguments.steps)
    domains = runs.pool.domain_names
    done = {(row["mixer"], row["seed"]) for row in read_rows(results)}
    packages = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    for seed in arguments.seeds:
        for mixer in MIXERS:
            if (mixer, str(seed)) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                perplexity, rows = runs.of(mixer, seed, Path(folder, mixer))
            tokens = arguments.steps * BATCH * TOKENS
            append(moves, rows)
            append(results, [{"mixer": mixer, "seed": seed, "tokens": tokens, **perplexity, **packages}])
            print(mixer, seed, {name: round(value, 3) for name, value in perplexity.items()}, flush=True)
    print(table(read_rows(results), domains))
    plot(read_rows(moves), domains, RESULTS / f"{arguments.name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
