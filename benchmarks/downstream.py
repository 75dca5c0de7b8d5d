"""Does choosing help? Loss on the target after training with each way to choose, same steps, same seeds.

    python benchmarks/downstream.py demo --csv FILE [--seeds 3] [--processes 2]
    python benchmarks/downstream.py real --data FOLDER --csv FILE
    python benchmarks/downstream.py shares --data FOLDER --csv FILE
    python benchmarks/downstream.py smollm2 --data FOLDER --model FOLDER --csv FILE

demo: the four domains of the demo, target date arithmetic. real: FOLDER's alpaca_en_demo and gsm8k_train (400 rows of
each), target gsm8k_val. A small Llama from random weights trains under ZeRO-3 through `dataflex-cli train`; the
methods differ in nothing but how samples are chosen after a common warm-up: less, less with exact scores, loss,
random, and `full`, which goes on with the whole pool. Half of the target is what the selectors see (target_loss),
the other half nobody sees (held_out_loss). Each finished run is a line of FILE and is not run again; the table at
the end has means and standard deviations over seeds.

shares: how much of what is picked, 10% of the whole pool, is gsm8k, against its share of the pool: less and random
after a warm-up, ZeRO-3, two ranks.

smollm2: less and random with the pretrained model that `real_model.py fetch` makes, LoRA, ZeRO-3, 200 rows each of
alpaca_en_demo and gsm8k_train: the picks are 30% of the pool, and the target is in two halves as above.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from less_setup import no_data, show

ROOT = Path(__file__).resolve().parents[1]
METHODS: dict[str, dict[str, Any]] = {
    "less": {"component_name": "less"},
    "less exact": {"component_name": "less"},
    "loss": {"component_name": "loss"},
    "random": {"component_name": "random"},
    "full": {"train_type": "static"},
}
BASE: dict[str, Any] = {
    "model_name_or_path": str(ROOT / "configs" / "models" / "tiny_llama"),
    "train_from_scratch": True,
    "stage": "sft",
    "finetuning_type": "full",
    "gradient_checkpointing": False,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "deepspeed": "ds_zero3.json",
    "train_type": "dynamic_select",
    "logging_steps": 5,
    "save_strategy": "no",
    "overwrite_output_dir": True,
    "eval_dataset": "target",
    "eval_strategy": "steps",
}
# global_batch: over all processes.
SUITES: dict[str, dict[str, Any]] = {
    "demo": {
        "dataset": ["arithmetic", "strings", "units", "dates"],
        "target": "dates_target",
        "cutoff_len": 192,
        "max_samples": 250,
        "schedule": {"warmup_step": 40, "update_step": 12, "update_times": 2},
        "global_batch": 16,
    },
    "real": {
        "dataset": ["alpaca_en_demo", "gsm8k_train"],
        "target": "gsm8k_val",
        "cutoff_len": 192,
        "max_samples": 400,
        "schedule": {"warmup_step": 40, "update_step": 12, "update_times": 2},
        "global_batch": 16,
    },
    "shares": {
        "dataset": ["alpaca_en_demo", "gsm8k_train"],
        "target": "gsm8k_val",
        "cutoff_len": 256,
        "max_samples": None,
        "schedule": {"warmup_step": 60, "update_step": 25, "update_times": 1},
        "global_batch": 8,
        "methods": ("less", "random"),
    },
    "smollm2": {
        "dataset": ["alpaca_en_demo", "gsm8k_train"],
        "target": "gsm8k_val",
        "cutoff_len": 256,
        "max_samples": 200,
        "schedule": {"warmup_step": 10, "update_step": 30, "update_times": 1},
        "global_batch": 4,
        "methods": ("less", "random"),
        "settings": {
            "train_from_scratch": False,
            "finetuning_type": "lora",
            "lora_rank": 16,
            "learning_rate": 2e-4,
        },
    },
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=tuple(SUITES))
    parser.add_argument("--data", type=Path, help="a dataset_dir with alpaca_en_demo, gsm8k_train and gsm8k_val")
    parser.add_argument("--model", type=Path, help="smollm2: the folder of the model")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/downstream"), help="where runs and data go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="two steps and few samples: shows that everything runs")
    return parser.parse_args()


def read_rows(folder: Path, name: str) -> list[Any]:
    """The rows of a dataset that dataset_info.json names."""
    entry = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))[name]
    rows: list[Any] = json.loads((folder / entry["file_name"]).read_text(encoding="utf-8"))
    return rows


def prepare(suite: dict[str, Any], source: Path, folder: Path) -> None:
    """Write the suite's datasets into ``folder``, the target in two halves: every other row."""
    folder.mkdir(parents=True, exist_ok=True)
    target = read_rows(source, suite["target"])
    halves = {"target": target[::2], "held_out": target[1::2]}
    parts = {"target": target} if suite is SUITES["shares"] else halves
    parts |= {name: read_rows(source, name) for name in suite["dataset"]}
    for name, rows in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    info = {name: {"file_name": f"{name}.json"} for name in parts}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def settings(asked: argparse.Namespace, suite: dict[str, Any], data: Path) -> dict[str, Any]:
    """What every run of a suite shares."""
    batch = suite["global_batch"]
    assert batch % asked.processes == 0, f"--processes must divide the global batch of {batch}"
    schedule = {**suite["schedule"], "warmup_step": 1, "update_step": 1} if asked.smoke else suite["schedule"]
    steps = schedule["warmup_step"] + schedule["update_step"] * schedule["update_times"]
    shared = {
        **BASE,
        **suite.get("settings", {}),
        **schedule,
        "dataset": suite["dataset"],
        "dataset_dir": str(data.resolve()),
        "cutoff_len": suite["cutoff_len"],
        "per_device_train_batch_size": batch // asked.processes,
        "eval_steps": steps,
    }
    if asked.model is not None:
        shared["model_name_or_path"] = str(asked.model.resolve())
    samples = 24 if asked.smoke else suite["max_samples"]
    return shared if samples is None else shared | {"max_samples": samples}


def components(method: str, seed: int) -> dict[str, Any]:
    """The packaged params with this seed; and exact scores where the method asks for them."""
    packaged = yaml.safe_load((ROOT / "configs" / "components.yaml").read_text(encoding="utf-8"))["selectors"]
    name = METHODS[method].get("component_name", "random")
    entry = packaged[name]
    entry["params"]["seed"] = seed
    if method == "less exact":
        entry["params"] |= {"scoring": "exact"}
    return {"selectors": {name: entry}}


def run_config(shared: dict[str, Any], method: str, seed: int) -> dict[str, Any]:
    """The flat YAML keys of one run, without its folders."""
    config = shared | METHODS[method] | {"seed": seed}
    if method == "full":
        schedule = ("warmup_step", "update_step", "update_times")
        config = {k: v for k, v in config.items() if k not in schedule} | {"train_step": shared["eval_steps"]}
    return config


def train(asked: argparse.Namespace, shared: dict[str, Any], method: str, seed: int) -> tuple[Path, float]:
    """One run of the command line; returns its folder and its seconds."""
    folder = asked.work / asked.suite / f"{method.replace(' ', '_')}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    parts = folder.with_suffix(".components.yaml")
    parts.write_text(yaml.safe_dump(components(method, seed)), encoding="utf-8")
    config = run_config(shared, method, seed)
    if method != "full":
        config["components_cfg_file"] = str(parts.resolve())
    base = folder.with_suffix(".yaml")
    base.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "dataflex.cli", "train", str(base), f"output_dir={folder.resolve()}"]
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **os.environ}
    started = time.monotonic()
    done = subprocess.run(
        [*command, "--num_processes", str(asked.processes)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{method}, seed {seed} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return folder, time.monotonic() - started


def pools(shared: dict[str, Any], *names: str) -> list[Any]:
    """The tokenised pools of datasets as a run reads them; without names the training pool."""
    from dataflex.config import load_config
    from dataflex.data.load import load_pool
    from dataflex.engine.models.model import load_tokenizer

    cfg = load_config(shared | {"output_dir": "unused", "component_name": "random"}, quiet=True)
    tokenizer = load_tokenizer(cfg)
    wanted = [list(shared["dataset"])] if not names else [[name] for name in names]
    return [load_pool(cfg, tokenizer, each, "dataset") for each in wanted]


def token_loss(folder: Path, pool: Any) -> float:
    """Mean loss of the counted tokens of ``pool`` with the model that a run exported."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    from dataflex.data.encoding.collate import Collator

    transformers.utils.logging.disable_progress_bar()
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, counted, collate = 0.0, 0, Collator(0)
    for start in range(0, len(pool), 16):
        batch = collate([pool[i] for i in range(start, min(start + 16, len(pool)))])
        labels = batch.pop("labels")[:, 1:].flatten()
        with torch.no_grad():
            logits = net(**batch).logits[:, :-1].flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        counted += int((labels != -100).sum())
    return total / counted


def chosen_share(folder: Path, pool: Any, domain: str) -> float | str:
    """Share of a domain among the picks of all decisions of a run; empty where nothing was decided."""
    picks: list[int] = []
    for file in sorted((folder / "decisions").glob("step_*.json")):
        picks += json.loads(file.read_text(encoding="utf-8"))["indices"]
    number = pool.domain_names.index(domain)
    return round(float((pool.domain_ids[picks] == number).mean()), 4) if picks else ""


def finished(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def table(rows: list[dict[str, str]], suite: str) -> list[dict[str, str]]:
    """Mean and standard deviation over seeds, by method."""
    found = []
    for method in METHODS:
        mine = [row for row in rows if row["suite"] == suite and row["method"] == method]
        if not mine:
            continue
        made = {"method": method, "seeds": str(len(mine))}
        for key in ("target_loss", "held_out_loss", "share_of_target_domain"):
            values = [float(row[key]) for row in mine if row[key]]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            made[key] = f"{statistics.mean(values):.4f}{spread}" if values else ""
        found.append(made)
    return found


def result(asked: argparse.Namespace, shared: dict[str, Any], data: dict[str, Any], method: str, seed: int) -> Any:
    """Train and measure: one line of the CSV."""
    import torch
    from measure import machine

    folder, seconds = train(asked, shared, method, seed)
    results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    domain, pool = data["domain"], data["pool"]
    of_pool = float((pool.domain_ids == pool.domain_names.index(domain)).mean())
    return {
        "suite": asked.suite,
        "method": method,
        "seed": seed,
        "steps": shared["eval_steps"],
        "target_loss": round(results["eval_loss"], 5),
        "held_out_loss": round(token_loss(folder, data["held_out"]), 5) if data["held_out"] else "",
        "share_of_target_domain": chosen_share(folder, pool, domain),
        "share_in_pool": round(of_pool, 4),
        "processes": asked.processes,
        "seconds": round(seconds),
        **{name: version(name) for name in ("deepspeed", "transformers")},
        **machine(torch.device("cpu")),
    }


def main() -> None:
    asked = arguments()
    suite = SUITES[asked.suite]
    source = asked.data
    if asked.suite == "demo":
        from dataflex.demo.generate import generate

        source = asked.work / "demo_source"
        generate(source)
    elif reason := no_data(asked.data):
        print(f"skipped: {reason}")
        return
    if asked.suite == "smollm2" and asked.model is None:
        print("skipped: no --model FOLDER given (python benchmarks/real_model.py fetch FOLDER)")
        return
    folder = asked.work / asked.suite / "data"
    prepare(suite, source, folder)
    shared = settings(asked, suite, folder)
    pool = pools(shared)[0]
    held_out = None if asked.suite == "shares" else pools(shared, "held_out")[0]
    data = {"pool": pool, "held_out": held_out, "domain": suite["dataset"][-1]}
    methods = asked.methods or suite.get("methods", tuple(METHODS))
    for seed in range(1, asked.seeds + 1):
        for method in methods:
            known = [(row["suite"], row["method"], row["seed"], row["steps"]) for row in finished(asked.csv)]
            if (asked.suite, method, str(seed), str(shared["eval_steps"])) in known:
                continue
            row = result(asked, shared, data, method, seed)
            append(asked.csv, row)
            print("  ".join(f"{k}={row[k]}" for k in list(row)[:10]), flush=True)
    columns = ("method", "seeds", "target_loss", "held_out_loss", "share_of_target_domain")
    show(table(finished(asked.csv), asked.suite), columns)


if __name__ == "__main__":
    main()
