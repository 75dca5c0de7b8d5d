"""What is compared: the suites' data, model and steps; the ways to choose; the settings of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
TARGET, HELD_OUT = "target", "held_out"
# Selectors: (entry of components.yaml, params over those of the file).
SELECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "less": ("less", {"self_check": False}),
    "less, round robin": ("less", {"self_check": False, "aggregate": "round_robin", "per": "target"}),
    "less exact": ("less_exact", {"self_check": False}),
    "less_head": ("less_head", {}),
    "cluster_less": ("cluster_less", {}),
    "loss": ("loss", {}),
    "rds": ("rds", {}),
    "rds, max": ("rds", {"aggregate": "max"}),
    "near": ("near", {}),
    "tsds": ("tsds", {}),
}
RANDOM, OWN_DOMAIN, FULL_POOL = "random", "target's own domain", "full pool"
SAME_LENGTHS = {"random, lengths of less": "less", "random, lengths of rds": "rds"}
BASELINES = (RANDOM, *SAME_LENGTHS, FULL_POOL, OWN_DOMAIN)
DEAREST = "less"  # equal minutes are those that it needs for its selection and its steps

BASE: dict[str, Any] = {
    "stage": "sft",
    "gradient_checkpointing": False,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "deepspeed": "ds_zero0.json",
    "train_type": "dynamic_select",
    "update_times": 1,
    "logging_steps": 20,
    "save_strategy": "no",
    "overwrite_output_dir": True,
}
TINY: dict[str, Any] = {
    "model_name_or_path": str(ROOT / "configs" / "models" / "tiny_llama"),
    "train_from_scratch": True,
    "finetuning_type": "full",
    "learning_rate": 2e-3,
    "cutoff_len": 192,
}


@dataclass(frozen=True)
class Suite:
    """datasets: of the pool; the last one is the target's own. rows: of each. target: whose rows are cut in two halves.

    longest: characters that a row of the pool may have. batch: samples a step. warm: random steps before the decision;
    steps: trained after it where steps are equal; every: steps from one evaluation to the next, which divides both.
    one_selection: the seeds share the picks that seed 1's weights give.
    """

    datasets: tuple[str, ...]
    target: str
    rows: int
    target_rows: int
    batch: int
    warm: int
    steps: int
    every: int
    settings: dict[str, Any]
    budgets: tuple[float, ...] = (0.02, 0.1)
    longest: int | None = None
    methods: tuple[str, ...] = (*SELECTORS, *BASELINES)
    one_selection: bool = False
    model: Path | None = field(default=None)

    def count(self, budget: float, pool: int) -> int:
        """Samples of a budget, in whole batches, at least one."""
        return max(1, round(budget * pool / self.batch)) * self.batch


SUITES: dict[str, Suite] = {
    "demo": Suite(("arithmetic", "strings", "units", "dates"), "dates_target", 300, 128, 8, 40, 60, 10, TINY),
    "real": Suite(("alpaca_en_demo", "gsm8k_train"), "gsm8k_val", 600, 100, 8, 40, 60, 10, TINY),
    "smollm2": Suite(
        ("alpaca_en_demo", "gsm8k_train"),
        "gsm8k_val",
        rows=200,
        target_rows=48,
        batch=4,
        warm=18,
        steps=36,
        every=18,
        settings={"finetuning_type": "lora", "lora_rank": 16, "learning_rate": 2e-4, "cutoff_len": 256},
        budgets=(0.1,),
        longest=420,
        methods=("less", "rds", RANDOM, OWN_DOMAIN),
        one_selection=True,
    ),
}


def small(suite: Suite) -> Suite:
    """The same with few samples and steps: it shows that everything runs."""
    return replace(
        suite, rows=10, target_rows=8, batch=2, warm=2, steps=2, every=2, longest=None, budgets=suite.budgets[-1:]
    )


def prepare(suite: Suite, source: Path, folder: Path) -> None:
    """Write the suite's datasets into ``folder``: the first fitting rows, the target in two halves, every other row."""
    target = _read(source, suite.target)[: suite.target_rows]
    parts = {TARGET: target[::2], HELD_OUT: target[1::2]}
    for name in suite.datasets:
        rows = [row for row in _read(source, name) if suite.longest is None or _characters(row) <= suite.longest]
        parts[name] = rows[: suite.rows]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    info = {name: {"file_name": f"{name}.json"} for name in parts}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def write_demo(suite: Suite, folder: Path) -> None:
    """Rows of the demo's tasks, as many as the suite asks for."""
    from dataflex.demo.generate import TARGET_DOMAIN, make_rows

    folder.mkdir(parents=True, exist_ok=True)
    sets = {}
    for name in suite.datasets:
        more = suite.target_rows if name == TARGET_DOMAIN else 0
        rows = make_rows(name, suite.rows + more, seed=0)
        sets[name] = rows[: suite.rows]
        if more:
            sets[suite.target] = rows[suite.rows :]
    for name, rows in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    info = {name: {"file_name": f"{name}.json"} for name in sets}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def _read(folder: Path, name: str) -> list[Any]:
    entry = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))[name]
    rows: list[Any] = json.loads((folder / entry["file_name"]).read_text(encoding="utf-8"))
    return rows


def _characters(row: dict[str, Any]) -> int:
    return sum(len(row.get(key) or "") for key in ("instruction", "input", "output"))


def shared(suite: Suite, data: Path, seed: int) -> dict[str, Any]:
    """The flat YAML keys that all runs of a seed have: up to the decision all do the same with the same weights."""
    model = {} if suite.model is None else {"model_name_or_path": str(suite.model.resolve())}
    return {
        **BASE,
        **suite.settings,
        **model,
        "seed": seed,
        "dataset": list(suite.datasets),
        "dataset_dir": str(data.resolve()),
        "per_device_train_batch_size": suite.batch,
        "warmup_step": suite.warm,
    }


def selecting(suite: Suite, data: Path, method: str, seed: int, most: int) -> dict[str, Any]:
    """The keys of a run that ``method`` chooses in. most: the largest number of samples that it is asked for."""
    name, params = SELECTORS[method]
    packaged = yaml.safe_load((ROOT / "configs" / "components.yaml").read_text(encoding="utf-8"))["selectors"]
    seeded = {"seed": seed} if "seed" in (packaged[name]["params"] or {}) or name == "loss" else {}
    return shared(suite, data, seed) | {
        "eval_dataset": [TARGET],
        "component_name": name,
        "component_params": {"select": {**params, **seeded}},
        "update_step": most // suite.batch,
    }


def training(suite: Suite, data: Path, seed: int, picks: Path, count: int, steps: int) -> dict[str, Any]:
    """The keys of a run that goes over the ``count`` samples of the file ``picks`` again and again for ``steps``."""
    return shared(suite, data, seed) | {
        "eval_dataset": [TARGET, HELD_OUT],
        "eval_strategy": "steps",
        "eval_steps": suite.every,
        "component_modules": [str(Path(__file__).with_name("given.py"))],
        "component_name": "given",
        "component_params": {"select": {"picks": str(picks.resolve())}},
        "update_step": count // suite.batch,
        "train_step": suite.warm + steps,
    }


def available(methods: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``methods`` that this version has, with what is compared with them."""
    packaged = yaml.safe_load((ROOT / "configs" / "components.yaml").read_text(encoding="utf-8"))["selectors"]
    there = {method for method, (name, _) in SELECTORS.items() if name in packaged}
    return tuple(
        m for m in methods if (m in there if m in SELECTORS else SAME_LENGTHS.get(m, RANDOM) in (*there, RANDOM))
    )
