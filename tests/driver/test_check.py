"""`dataflex-cli check` as a user starts it."""

from __future__ import annotations

from pathlib import Path

from tests.driver.workspace import launched, write_yaml


def test_check_prints_verdicts_and_writes_nothing(workspace: Path) -> None:
    less = {"train_type": "dynamic_select", "component_name": "less", "eval_dataset": ["target"], "update_step": 2}
    config = write_yaml(workspace, "check.yaml", **less, output_dir=str(workspace / "checked"))
    done = launched("check", config, "bf16=true")
    assert done.returncode == 0, done.stdout
    verdicts = [line for line in done.stdout.splitlines() if line.startswith(("ok  ", "FAIL"))]
    points = ["coverage", "single-sample autograd", "ranks agree", "non-zero", "training state"]
    assert [line[6:].split(":")[0] for line in verdicts] == points
    assert all(line.startswith("ok") for line in verdicts)
    assert "4 samples, largest relative error" in verdicts[1] and "(bfloat16 tolerance" in verdicts[1]
    assert "xorfold features of 4096" in verdicts[3]
    assert done.stdout.splitlines()[-1] == "check: gradient scoring is right on this model, engine and data"
    assert not (workspace / "checked").exists()
