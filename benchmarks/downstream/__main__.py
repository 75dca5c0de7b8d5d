"""Does choosing help? Loss on the target by the way to choose, at equal steps and at equal minutes, with its cost.

    python benchmarks/downstream calibrate demo --calibration CAL.csv [--rounds 3]     # on a quiet machine
    python benchmarks/downstream run demo --calibration CAL.csv --csv RUNS.csv [--seeds 3] [--jobs 2]
    python benchmarks/downstream table demo --calibration CAL.csv --csv RUNS.csv
    (suites: demo; real --data FOLDER; smollm2 --data FOLDER --model FOLDER)

demo: the four domains of the demo, 300 rows each, target date arithmetic. real: 600 rows each of FOLDER's
alpaca_en_demo and gsm8k_train, target gsm8k_val. Both train a Llama of 0.46 million parameters from random weights.
smollm2: 200 short rows each of the same, LoRA on the model that `real_model.py fetch` makes. The target is in two
halves: the selectors see one (target_loss), nobody the other (held_out_loss).

A run has one process (ZeRO-0), some random steps, and one decision that picks 2% or 10% of the pool. It goes over the
picks until its steps are done, at a learning rate that stays the same, so that its curve can be read at any step: it
counts where the half that the selectors see is best, since few picks are soon learnt by heart, and ends where that
half's loss is a tenth above its lowest. Of a seed all runs begin with the same weights and the same random steps.
Equal minutes are those that less needs for its selection and its steps; how many steps another method makes in them
follows from `calibrate`, which times each selection and the steps (these by the tokens of the picks). So the runs
themselves may share a busy machine. What is random is a control and costs nothing: random samples, random ones with
the lengths of a method's picks, random ones of the target's domain, and the full pool.

Each finished run is a line of RUNS.csv and is not run again; selections are kept in --work.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from less_setup import no_data, show

from downstream.picks import Picker
from downstream.runs import Cost, Runs
from downstream.suites import (
    DEAREST,
    FULL_POOL,
    SELECTORS,
    SUITES,
    Suite,
    available,
    prepare,
    shared,
    small,
    write_demo,
)
from downstream.tables import LEGEND, conditions, table

COST_COLUMNS = ("method", "selection_seconds", "seconds_per_1000", "of_less", "choice_seconds", "step_seconds")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="downstream", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("calibrate", "run", "table"))
    parser.add_argument("suite", choices=tuple(SUITES))
    parser.add_argument("--data", type=Path, help="a dataset_dir with alpaca_en_demo, gsm8k_train and gsm8k_val")
    parser.add_argument("--model", type=Path, help="smollm2: the folder of the model")
    parser.add_argument("--csv", type=Path, help="the runs")
    parser.add_argument("--calibration", type=Path, help="what `calibrate` writes; without it no equal minutes")
    parser.add_argument("--work", type=Path, default=Path("runs/downstream"), help="where runs and data go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", help="some of the suite's")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--rounds", type=int, default=3, help="calibrate: selections timed of each method")
    parser.add_argument("--smoke", action="store_true", help="two steps and few samples: shows that everything runs")
    asked = parser.parse_args(words)
    needed = {"calibrate": ("calibration",), "run": ("csv",), "table": ("csv",)}[asked.stage]
    for key in needed:
        if getattr(asked, key) is None:
            parser.error(f"{asked.stage} needs --{key} FILE")
    unknown = [method for method in asked.methods or () if method not in SUITES[asked.suite].methods]
    if unknown:
        parser.error(f"--methods: '{unknown[0]}'; {asked.suite} has {', '.join(SUITES[asked.suite].methods)}")
    return asked


def asked_suite(asked: argparse.Namespace) -> Suite:
    suite = replace(SUITES[asked.suite], model=asked.model)
    return small(suite) if asked.smoke else suite


def open_picker(asked: argparse.Namespace, suite: Suite) -> Picker:
    """Write the suite's data, and read its pool as a run does."""
    from dataflex.config import load_config
    from dataflex.data.load import load_pool
    from dataflex.engine.models.model import load_tokenizer

    folder = asked.work / asked.suite
    source = asked.data
    if asked.suite == "demo":
        source = folder / "source"
        write_demo(suite, source)
    data = folder / "data"
    prepare(suite, source, data)
    config = shared(suite, data, 1) | {"output_dir": "unused", "component_name": "random", "update_step": 1}
    cfg = load_config(config, quiet=True)
    pool = load_pool(cfg, load_tokenizer(cfg), list(suite.datasets), "dataset")
    return Picker(suite, pool, data, folder / "picks", asked.threads)


def calibrate(asked: argparse.Namespace, suite: Suite, picker: Picker, methods: tuple[str, ...]) -> None:
    """Time each selector's selection, one after the other; a line of the CSV each, which is not made again."""
    rows: list[dict[str, Any]] = list(read(asked.calibration))
    known = [row["method"] for row in rows if row["suite"] == asked.suite]
    for method in (m for m in methods if m in SELECTORS and m not in known):
        found = picker.answer(method, 1, asked.rounds, anew=True)
        seconds, pool = found["selection_seconds"], len(picker.pool)
        median = statistics.median(seconds)
        rows.append(
            {
                "suite": asked.suite,
                "method": method,
                "pool": pool,
                "samples_scored": found["samples_scored"],
                "selection_seconds": round(median, 4),
                "fastest_slowest": f"{min(seconds):.3f}-{max(seconds):.3f}",
                "rounds": len(seconds),
                "choice_seconds": round(found["choice_seconds"], 4),
                "seconds_per_1000": f"{1000 * median / pool:.3g}",
                "of_less": "",
                "step_seconds": round(found["step_seconds"], 5),
                "step_tokens": round(found["step_tokens"], 1),
                **machine(asked),
            }
        )
        write(asked.calibration, beside_less(rows))
        print(f"{asked.suite}  {method}: {median:.2f} s, a step {found['step_seconds']:.3f} s", flush=True)
    mine = [row for row in read(asked.calibration) if row["suite"] == asked.suite]
    show(mine, COST_COLUMNS)


def beside_less(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with each selection's time as a multiple of less's of the same suite."""
    less = {row["suite"]: float(row["selection_seconds"]) for row in rows if row["method"] == DEAREST}
    return [
        row | {"of_less": f"{float(row['selection_seconds']) / less[row['suite']]:.3f}"}
        if row["suite"] in less
        else row
        for row in rows
    ]


def run(asked: argparse.Namespace, suite: Suite, picker: Picker, methods: tuple[str, ...]) -> None:
    """What is missing of every method, budget and seed: first all selections, then the runs."""
    cost = None if asked.calibration is None else Cost.of(read(asked.calibration), asked.suite)
    if cost is None:
        print("no calibration of this suite: equal steps only", flush=True)
    runs = Runs(asked.suite, picker, asked.work / asked.suite / "runs", cost)
    seeds = range(1, asked.seeds + 1)
    every = [(m, b, s) for s in seeds for b in suite.budgets for m in methods]
    every = [key for key in every if key[0] != FULL_POOL or key[1] == suite.budgets[0]]
    known = {(row["suite"], row["method"], row["budget"], row["seed"]) for row in read(asked.csv)}
    jobs = [(m, b, s) for m, b, s in every if (asked.suite, m, "" if m == FULL_POOL else str(b), str(s)) not in known]
    selectors = [m for m in methods if m in SELECTORS]
    pick_seeds = [1] if suite.one_selection else seeds
    chosen = [(m, s) for s in pick_seeds for m in dict.fromkeys((*selectors, DEAREST))]
    lock = threading.Lock()

    def select(method: str, seed: int) -> str:
        picker.answer(method, seed)
        return f"selection by {method}, seed {seed}"

    def train(method: str, budget: float, seed: int) -> str:
        row = runs.row(method, budget, seed)
        with lock:
            append(asked.csv, row | machine(asked))
        held = ", ".join(str(row[key]) for key in ("held_out_loss", "held_out_loss_minutes"))
        return f"{method}, {budget:.0%}, seed {seed}: held out {held}"

    side_by_side(asked, "selections", select, chosen)
    side_by_side(asked, "runs", train, jobs)


def side_by_side(asked: argparse.Namespace, what: str, do: Callable[..., str], keys: list[Any]) -> None:
    """``do(*key)`` for each key, --jobs at a time, with a line of progress for each; the first failure ends all."""
    started = time.monotonic()
    for done, said in enumerate(results(asked.jobs, do, keys), start=1):
        left = (time.monotonic() - started) / done * (len(keys) - done) / 60
        print(f"[{done}/{len(keys)} {what}, {left:.0f} min left] {asked.suite}: {said}", flush=True)


def results(jobs: int, do: Callable[..., str], keys: list[Any]) -> Iterator[str]:
    """What ``do`` returns, as it is done."""
    if jobs == 1:
        yield from (do(*key) for key in keys)
        return
    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(do, *key) for key in keys]):
            if future.exception() is not None:
                pool.shutdown(cancel_futures=True)
            yield future.result()


def tables(asked: argparse.Namespace, suite: Suite) -> None:
    """Markdown tables of what there is: one for each budget, and one of the cost."""
    rows, calibrations = read(asked.csv), [] if asked.calibration is None else read(asked.calibration)
    for budget in suite.budgets:
        found = table(rows, calibrations, asked.suite, str(budget))
        if found:
            print(f"\n{asked.suite}, {budget:.0%} of the pool:\n")
            show(found, list(found[0]))
    mine = [row for row in rows if row["suite"] == asked.suite]
    costs = [row for row in calibrations if row["suite"] == asked.suite]
    print(f"\n{LEGEND}\n\nRuns: {conditions(mine)}.")
    if costs:
        print(f"\nA selection from {costs[0]['pool']} samples: {conditions(costs)}, nothing else running.\n")
        show(costs, COST_COLUMNS)


def machine(asked: argparse.Namespace) -> dict[str, Any]:
    """Hardware and versions, for every row; threads are those of a run."""
    import torch
    from measure import machine as this_machine

    here = this_machine(torch.device("cpu"))
    hardware = here["hardware"].rsplit(",", 1)[0]
    versions = {name: version(name) for name in ("deepspeed", "transformers")}
    return {"hardware": hardware, "threads": asked.threads, "torch": here["torch"], **versions}


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[-1]))
        writer.writeheader()
        writer.writerows(rows)


def append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main(words: list[str] | None = None) -> None:
    asked = arguments(words)
    suite = asked_suite(asked)
    if asked.stage == "table":
        tables(asked, suite)
        return
    if asked.suite != "demo" and (reason := no_data(asked.data)):
        print(f"skipped: {reason}")
        return
    if asked.suite == "smollm2" and asked.model is None:
        print("skipped: no --model FOLDER given (python benchmarks/real_model.py fetch FOLDER)")
        return
    wanted = tuple(asked.methods or suite.methods)
    methods = available(wanted)
    for missing in (m for m in wanted if m not in methods):
        print(f"skipped: this version has no {missing}")
    picker = open_picker(asked, suite)
    {"calibrate": calibrate, "run": run}[asked.stage](asked, suite, picker, methods)


if __name__ == "__main__":
    main()
