"""The comparison of ways to choose: its statistics and its minutes by hand, its suites on a few samples."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.config import load_config
from tests.distributed import ROOT, run_ranks

FOLDER = str(ROOT / "benchmarks")
TINY = ROOT / "configs/models/tiny_llama"
NAMES = ("alpaca_en_demo", "gsm8k_train", "gsm8k_val")


def module(name: str) -> Any:
    if FOLDER not in sys.path:
        sys.path.insert(0, FOLDER)
    return importlib.import_module(f"downstream.{name}")


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_the_smallest_difference_by_hand() -> None:
    tables = module("tables")
    assert tables.smallest_difference(0.1, 3) == pytest.approx((4.303 + 1.061) * 0.1 / 3**0.5)
    assert tables.smallest_difference(0.1, 10) == pytest.approx((2.262 + 0.883) * 0.1 / 10**0.5)
    assert tables.is_seen([-0.10, -0.11, -0.09])
    assert not tables.is_seen([-0.10, 0.11, -0.09])
    assert not tables.is_seen([-0.10])
    error = 0.1 / 3**0.5
    for mean, seen in ((4.30 * error, False), (4.31 * error, True)):
        assert tables.is_seen([mean - 0.1, mean, mean + 0.1]) is seen


def test_samples_of_the_same_lengths() -> None:
    picks = module("picks")
    lengths = np.arange(200)[::-1] + 10  # bins of ten: sample 199 is the shortest
    found = picks.same_lengths(lengths, np.array([0, 1, 2, 199, 198]), seed=3)
    assert len(set(found.tolist())) == 5
    assert sorted((found // 10).tolist()) == [0, 0, 0, 19, 19]
    assert picks.same_lengths(lengths, np.array([0, 1, 2, 199, 198]), seed=4).tolist() != found.tolist()
    many = picks.same_lengths(lengths, np.repeat(5, 12), seed=3)
    assert len(many) == 12
    assert set((many // 10).tolist()) == {0}


def test_smaller_budgets_are_of_the_same_random_samples() -> None:
    picks = module("picks")
    ten, forty = (picks.random_picks(np.arange(50, 100), count, seed=1) for count in (10, 40))
    assert ten.tolist() == forty[:10].tolist()
    assert len(set(forty.tolist())) == 40
    assert min(forty) >= 50


def test_equal_minutes_by_hand() -> None:
    """less: 10 s and 60 steps of 0.1 s."""
    cost = module("runs").Cost({"less": 10.0, "rds": 4.0, "less exact": 20.0}, 0.1, 100.0)
    within = {method: cost.steps_within(method, 100, 100, 60) for method in ("less", "rds", "less exact", "random")}
    assert within == {"less": 60, "rds": 120, "less exact": 0, "random": 160}
    assert cost.steps_within("random", 200, 100, 60) == 80, "samples of twice the length"
    assert cost.steps_within("random", 100, 200, 60) == 220, "less has twice the length"


def test_a_run_is_stopped_where_the_half_that_is_seen_is_best() -> None:
    best = module("runs").best_within
    curve = {0: (1.0, 9.0), 40: (2.0, 8.0), 50: (4.0, 1.0), 60: (3.0, 2.0), 70: (3.0, 0.0), 80: (1.5, 7.0)}
    assert [best(curve, 40, steps) for steps in (0, 10, 20, 30, 40)] == [40, 50, 60, 60, 80]


def test_a_run_ends_where_the_loss_is_a_tenth_above_its_lowest(tmp_path: Path) -> None:
    runs = module("runs")
    seen = {0: 9.0, 40: 1.0, 50: 3.0, 60: 2.0, 70: 2.19, 80: 2.21, 90: 1.5}
    curve = {step: (loss, 5.0) for step, loss in seen.items()}
    assert list(runs.until_past(curve, warm=40)) == [0, 40, 50, 60, 70, 80]
    parts = [{step: curve[step] for step in list(curve)[:count]} for count in range(len(curve) + 1)]
    assert [runs.is_past(part, warm=40) for part in parts] == [False] * 6 + [True, True]
    assert runs.read_curve(tmp_path) == {}
    line = {"current_steps": 7, "eval_loss": 1, "eval_target_loss": 2.5, "eval_held_out_loss": 3.5}
    whole = json.dumps(line) + "\n" + json.dumps({"current_steps": 8, "loss": 1}) + "\n"
    (tmp_path / "trainer_log.jsonl").write_text(whole + json.dumps(line | {"current_steps": 9})[:-4])
    assert runs.read_curve(tmp_path) == {7: (2.5, 3.5)}


def row(method: str, seed: int, held: float, timed: float, **more: str) -> dict[str, str]:
    losses = {"target_loss": "1", "held_out_loss": str(held), "held_out_loss_minutes": str(timed)}
    return {"suite": "s", "budget": "0.1", "method": method, "seed": str(seed), **losses, "picks_by_domain": ""} | more


def test_the_table_by_hand() -> None:
    rows = [
        *(row("random", s, 2.0 + s, 3.0 + s, picks_by_domain="a=6 b=2") for s in (1, 2, 3)),
        *(row("less", s, 1.5 + s - 0.1 * (s == 3), 3.5 + s, picks_by_domain="a=0 b=8") for s in (1, 2, 3)),
        row("full pool", 1, 2.5, 2.5, budget=""),
        row("rds", 1, 9, 9, suite="other"),
    ]
    calibrations = [{"suite": "s", "method": "less", "seconds_per_1000": "12.3"}]
    less, random, full = module("tables").table(rows, calibrations, "s", "0.1")
    assert (less["method"], random["method"], full["method"]) == ("less", "random", "full pool")
    assert random["equal steps"] == "4.0000 ± 1.0000"
    spread = (2 / 3) ** 0.5 * 0.1 / 2**0.5
    smallest = (4.303 + 1.061) * spread / 3**0.5
    assert less["equal steps, - random"] == f"-0.5333 ± {spread:.4f} * ({smallest:.4f})"
    assert less["equal minutes, - random"] == "0.5000 ± 0.0000 * (0.0000)"
    assert (less["picks by domain"], random["picks by domain"]) == ("b 100%", "a 75%, b 25%")
    assert (less["s per 1,000"], random["s per 1,000"]) == ("12.3", "0")
    assert (full["seeds"], full["equal steps, - random"]) == ("1", "-0.5000")


@pytest.mark.parametrize("name", ["demo", "real", "smollm2"])
def test_every_run_of_a_suite_is_valid(name: str, tmp_path: Path) -> None:
    suites = module("suites")
    suite = suites.SUITES[name]
    assert suite.warm % suite.every == 0
    assert suite.steps % suite.every == 0
    assert suite.datasets[-1] in ("dates", "gsm8k_train"), "the target's own domain is the last"
    model = {} if suite.settings.get("train_from_scratch") else {"model_name_or_path": str(TINY)}
    configs = [suites.training(suite, tmp_path, 3, tmp_path / "p.json", 80, suite.steps)]
    configs += [
        suites.selecting(suite, tmp_path, m, 3, 80) for m in suites.available(suite.methods) if m in suites.SELECTORS
    ]
    for config in configs:
        cfg = load_config(config | model | {"output_dir": str(tmp_path / "out")}, quiet=True)
        assert cfg.train.seed == 3
        assert (cfg.flex.warmup_step, cfg.flex.update_step) == (suite.warm, 80 // suite.batch)


def smoke(folder: str, name: str, methods: list[str]) -> dict[str, Any]:
    """Calibrate, run twice and print the table in this process; what was trained and what was printed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dataflex.driver.training import train

    main, processes, one_selection = module("__main__"), module("processes"), module("one_selection")
    trained: list[str] = []

    def select(job: Path, threads: int) -> None:
        asked = json.loads(job.read_text())
        Path(asked["answer"]).write_text(json.dumps({"job": asked, **one_selection.select(asked)}))

    def train_here(config: Path, threads: int, is_over: Callable[[], bool]) -> None:
        trained.append(config.stem)
        train(load_config(config, quiet=True))

    processes.select, processes.train = select, train_here
    model = Path(folder, "model")
    shutil.copytree(TINY, model)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)
    words = [name, "--smoke", "--work", f"{folder}/work", "--calibration", f"{folder}/cal.csv", "--methods", *methods]
    if name == "smollm2":
        words += ["--data", real_text(Path(folder, "data")), "--model", str(model)]
    runs = ["--csv", f"{folder}/runs.csv", "--seeds", "1"]
    main.main(["calibrate", *words, "--rounds", "2"])
    main.main(["run", *words, *runs])
    first = list(trained)
    main.main(["run", *words, *runs])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main.main(["table", *words, *runs])
    return {"trained": first, "again": trained[len(first) :], "table": said.getvalue()}


def real_text(folder: Path) -> str:
    """The demo's rows under the names of the real ones."""
    from dataflex.demo.generate import make_rows

    folder.mkdir()
    for i, name in enumerate(NAMES):
        rows = make_rows(("strings", "dates", "dates")[i], 30, seed=i)
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({name: {"file_name": f"{name}.json"} for name in NAMES}))
    return str(folder)


def test_the_demo_suite_runs_and_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    methods = ["less", "random", "target's own domain"]
    (found,) = run_ranks(
        "tests.benchmarks.test_downstream:smoke", 1, folder=str(tmp_path), name="demo", methods=methods
    )
    rows, (cost,) = rows_of(tmp_path / "runs.csv"), rows_of(tmp_path / "cal.csv")
    assert [(r["method"], r["budget"]) for r in rows] == [(method, "0.1") for method in methods]
    assert (len(found["trained"]), found["again"]) == (3, [])
    assert {int(r["pool"]) for r in rows} == {40}
    assert [int(r["picks"]) for r in rows] == [4] * 3
    assert rows[2]["picks_by_domain"] == "arithmetic=0 strings=0 units=0 dates=4"
    starts = {tuple(r["curve"].split()[:2]) for r in rows}
    assert len(starts) == 1, "the same weights before the decision"
    curve = rows[1]["curve"].split()
    assert [int(point.split(":")[0]) for point in curve] == list(range(0, 2 * len(curve), 2))
    assert f"4:{float(rows[1]['target_loss']):.5f}/{float(rows[1]['held_out_loss']):.5f}" in rows[1]["curve"]
    assert (cost["method"], cost["samples_scored"], cost["rounds"], cost["of_less"]) == ("less", "44", "2", "1.000")
    assert (rows[0]["steps_minutes"], int(rows[1]["steps_minutes"]) > 2) == ("2", True)
    assert found["table"].count("| less | 1 |") == 1


def test_the_suite_of_the_pretrained_model_runs(tmp_path: Path) -> None:
    arguments = {"folder": str(tmp_path), "name": "smollm2", "methods": ["less", "random"]}
    (found,) = run_ranks("tests.benchmarks.test_downstream:smoke", 1, **arguments)
    assert len(found["trained"]) == 2
    assert [r["picks"] for r in rows_of(tmp_path / "runs.csv")] == ["2", "2"]
