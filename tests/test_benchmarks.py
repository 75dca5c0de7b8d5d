"""The LESS benchmarks run, on tiny models; their figures mean nothing here."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import ROOT, run_ranks

FOLDER = str(ROOT / "benchmarks")
SCRIPTS = ("reference_less", "fidelity", "bench_less")


def module(name: str) -> Any:
    if FOLDER not in sys.path:
        sys.path.insert(0, FOLDER)
    return importlib.import_module(name)


def smoke(folder: str, names: Sequence[str]) -> list[str]:
    """Run the scripts one after the other in this process; returns the CSVs that they wrote."""
    written = []
    for name in names:
        written.append(f"{folder}/{name}.csv")
        sys.argv = [name, "--smoke", "--csv", written[-1]]
        module(name).main()
    return written


def rows_of(file: str) -> list[dict[str, str]]:
    with Path(file).open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_the_scripts_run(tmp_path: Path) -> None:
    (files,) = run_ranks("tests.test_benchmarks:smoke", 1, folder=str(tmp_path), names=SCRIPTS)
    agreement, fidelity, speed = map(rows_of, files)
    assert {row["a"] for row in agreement} >= {"dataflex seed 1", "reference seed 1"}
    assert {row["scoring"] for row in fidelity} == {"exact", *module("fidelity").PROJECTIONS}
    (exact,) = (row for row in fidelity if row["scoring"] == "exact")
    assert float(exact["each_spearman"]) >= 0.999
    assert {"training", "scoring"} <= {row["what"] for row in speed}


def test_losses_without_logits_are_measured(tmp_path: Path) -> None:
    ((file,),) = run_ranks("tests.test_benchmarks:smoke", 1, folder=str(tmp_path), names=["bench_head"])
    steps = {"lora step", "full step", "LESS, full", "LESS, tied", "frozen head alone", "trained head alone"}
    assert {row["what"] for row in rows_of(file)} == steps


def test_a_decision_by_neighbours_is_measured(tmp_path: Path) -> None:
    ((file,),) = run_ranks("tests.test_benchmarks:smoke", 1, folder=str(tmp_path), names=["bench_near"])
    assert [(row["rows"], row["picks"]) for row in rows_of(file)] == [("500", "25"), ("1000", "50"), ("2000", "100")]


def test_the_reference_scores_by_hand() -> None:
    import torch

    reference = module("reference_less")
    adam = reference.Adam(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0]))
    got = adam.direction(torch.tensor([2.0, 1.0], dtype=torch.float64))
    assert got.tolist() == pytest.approx([1.1 / (4.0 * 0.999 + 0.004) ** 0.5, 0.1 / (0.001 + 1e-8) ** 0.5], rel=1e-6)
    train = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    target = torch.tensor([[1.0, 0.0], [0.0, 5.0], [1.0, 0.0]])
    half = 0.5**0.5
    assert reference.influence(train, target, [0, 0, 0]).tolist() == pytest.approx([2 / 3, 1 / 3, half])
    assert reference.influence(train, target, [0, 1, 0]).tolist() == pytest.approx([1.0, 1.0, half])


def test_a_dense_projection_keeps_inner_products() -> None:
    import torch

    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 3000, generator=draw, dtype=torch.float64)
    sketch = module("reference_less").dense_rademacher(rows, 4096, seed=1)
    assert ((sketch @ sketch.T - rows @ rows.T).abs() / 3000).max() < 0.1


def test_without_real_text_the_scripts_say_so() -> None:
    done = subprocess.run([sys.executable, f"{FOLDER}/fidelity.py"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("skipped: no --data FOLDER given")


def test_the_page_of_families_says_what_the_rows_say() -> None:
    rows = [
        {"family": "opt", "finetuning": "full", "result": "exact", "error": "1.2e-06", "detail": ""},
        {"family": "opt", "finetuning": "lora", "result": "exact", "error": "1.0e-06", "detail": ""},
        {"family": "x", "finetuning": "lora", "result": "refused", "error": "", "detail": "a | b"},
    ]
    page = module("families_table").table(rows, "python x", "a CPU")
    assert page.endswith("| opt | exact 1.0e-06 | exact 1.2e-06 |  |\n| x | refused |  | lora: a / b |\n")
    assert "2 families" in page and "lora: 1 exact, 1 refused; full: 1 exact." in page


@pytest.mark.slow
def test_the_families_script_finds_two_families_exact(tmp_path: Path) -> None:
    words = [f"{FOLDER}/families.py", "--smoke", "--csv", "all.csv", "--table", "page.md"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = rows_of(str(tmp_path / "all.csv"))
    assert [(row["family"], row["finetuning"]) for row in found] == [
        (f, how) for f in ("llama", "opt") for how in ("lora", "full")
    ]
    assert {row["result"] for row in found} == {"exact"}
    assert (tmp_path / "page.md").read_text().count("exact") > 4


@pytest.mark.slow
def test_every_family_of_the_table_is_tiny() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    setup = module("families_setup")
    names = setup.families()
    assert len(names) >= 100 and names[0] == "llama"
    for family in names:
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(setup.tiny_config(family))
        assert sum(p.numel() for p in net.parameters()) < 400_000, family
