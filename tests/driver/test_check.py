"""`dataflex-cli check` as its launcher starts it on two ranks."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import PATIENCE_S
from tests.driver.forked_runs import ForkedRun
from tests.driver.workspace import write_yaml


def test_check_prints_verdicts_and_writes_nothing(workspace: Path) -> None:
    less = {"train_type": "dynamic_select", "component_name": "less", "eval_dataset": ["target"], "update_step": 2}
    less["model_name_or_path"] = str(workspace / "small")
    config = write_yaml(workspace, "check.yaml", **less, output_dir=str(workspace / "checked"))
    run = ForkedRun(["check", str(config), "bf16=true"], 2)
    text = run.end(PATIENCE_S)
    assert run.returncode == 0, text
    first, other = text.split("\nrank 1:\n")
    assert not [line for line in other.splitlines() if line.startswith(("ok  ", "FAIL", "check"))]
    verdicts = [line for line in first.splitlines() if line.startswith(("ok  ", "FAIL"))]
    points = ["coverage", "single-sample autograd", "ranks agree", "non-zero", "training state"]
    assert [line[6:].split(":")[0] for line in verdicts] == points
    assert all(line.startswith("ok") for line in verdicts)
    assert "4 samples, largest relative error" in verdicts[1] and "(bfloat16 tolerance" in verdicts[1]
    assert "xorfold features of 4096" in verdicts[3]
    assert first.splitlines()[-1] == "check: gradient scoring is right on this model, engine and data"
    assert not (workspace / "checked").exists()
