# ruff: noqa: E501 - whole lines of text are easier to search for
"""The command line: quick and lean, one line per wrong argument, and the way to launcher or driver."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

import dataflex
from dataflex import cli
from dataflex.config import Config
from dataflex.launcher import Request
from dataflex.utils.errors import UserError
from dataflex.utils.launch_folder import LAUNCH_DIR

ROOT = Path(__file__).resolve().parent.parent
YAML = "model_name_or_path: org/m\ndataset: a\noutput_dir: out\nimage_max_pixels: 3\n"


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_SIZE", LAUNCH_DIR):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "run.yaml").write_text(YAML)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text('{"a": {"file_name": "a.json"}, "test": {"file_name": "b.json"}}')
    return tmp_path / "run.yaml"


def program(*args: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "dataflex.cli", *args]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def test_help_is_quick_and_names_the_commands() -> None:
    start = time.monotonic()
    done = program("--help")
    assert time.monotonic() - start < 5
    assert done.returncode == 0
    assert "train" in done.stdout and "env" in done.stdout
    shown = program("train", "--help").stdout
    for flag in (
        "--num_processes",
        "--num_gpus",
        "--hostfile",
        "--include",
        "--exclude",
        "--master_port",
        "--launcher",
    ):
        assert flag in shown
    assert "--local_rank" not in shown


def test_version() -> None:
    assert program("--version").stdout == program("version").stdout == f"dataflex {dataflex.__version__}\n"


def test_config_and_command_line_load_no_heavy_module(run_yaml: Path) -> None:
    code = (
        "import sys, dataflex, dataflex.cli, dataflex.launcher, dataflex.config.components\n"
        f"dataflex.config.load_config({str(run_yaml)!r}, quiet=True)\n"
        "print({'torch', 'transformers', 'deepspeed', 'datasets', 'numpy', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_bad_config_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(YAML + "learning_rat: 1\nseed: x\n")
    done = program("train", str(tmp_path / "run.yaml"), "bf16=maybe")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"dataflex: error: {tmp_path}/run.yaml:learning_rat: unknown key (did you mean 'learning_rate'?)",
        "dataflex: error: command line:bf16: expected true or false, got 'maybe'",
        f"dataflex: error: {tmp_path}/run.yaml:seed: expected a whole number >= 0, got 'x'",
    ]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian", "x.yaml"], "unknown command 'trian' (did you mean 'train'?); the commands are train, score, embed, check, "
         "eval, doremi, select, export, show, version, env"),
        (["chat", "x.yaml"], "chat: dataflex only trains; write the model with `dataflex-cli export CFG export_dir=DIR`, "
         "and talk to it with `transformers chat DIR`"),
        (["webui"], "webui: dataflex has no web page; write a YAML file and start it with `dataflex-cli train CFG`"),
        (["train"], "the following arguments are required: CFG"),
        (["train", "x.yaml", "--banana", "3"], "unknown argument '--banana'"),
        (["train", "x.yaml", "--num_procs=3"], "unknown argument '--num_procs=3' (did you mean '--num_processes'?)"),
        (["train", "x.yaml", "--learning_rte", "3"], "unknown argument '--learning_rte' (did you mean '--learning_rate'?)"),
        (["train", "x.yaml", "--num_processes", "two"], "argument --num_processes/--num_gpus: invalid int value: 'two'"),
        (["env", "more"], "unknown argument 'more'"),
        (["show", "run", "seed=3"], "unknown argument 'seed=3'"),
        (["show"], "the following arguments are required: RUN"),
    ],
)  # fmt: skip
def test_wrong_arguments(args: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"dataflex: error: {line}\n"


def test_train_launches_itself_with_overrides_and_launcher_flags(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(cli, "launch", lambda *args: calls.append(args) or 7)
    flags = ["--num_gpus", "2", "--master_port=5000", "seed=3", "--no_ssh"]
    assert cli.main(["train", str(run_yaml), "bf16=true", *flags]) == 7
    worker = ["train", str(run_yaml), "bf16=true", "seed=3"]
    assert calls == [("dataflex.cli", worker, Request(2, {"master_port": "5000", "no_ssh": ""}))]
    assert capfd.readouterr().err.count("image_max_pixels: ignored") == 1


@pytest.mark.parametrize("command", ["train", "score", "embed"])
def test_a_dry_run_reaches_the_workers_as_a_key(run_yaml: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(cli, "launch", lambda *args: calls.append(args) or 0)
    assert cli.main([command, str(run_yaml), "--dry-run", "seed=3"]) == 0
    assert calls[0][1] == [command, str(run_yaml), "seed=3", "dry_run=true"]


SELECT = {"train_type": "dynamic_select", "component_name": "less", "update_step": "1", "eval_dataset": "test"}
NOT_THERE = [
    ({"template": "qwen_3"}, r"template: 'qwen_3' is not known \(did you mean 'qwen3'\?\); valid: alpaca, .*"),
    (
        {"template": "own.yaml#mien"},
        r"template: .*own.yaml has no template 'mien' \(did you mean 'mine'\?\); it has mine",
    ),
    ({"dataset": "a,b"}, r"dataset: 'b' is not in .*data/dataset_info.json; it has a, test"),
    (
        {"eval_dataset": "tset"},
        r"eval_dataset: 'tset' is not in .*dataset_info.json \(did you mean 'test'\?\); it has a, test",
    ),
    ({"dataset_dir": "no"}, r"dataset_dir: there is no folder no or .*/no"),
    ({"report_to": "mlflow"}, "report_to: mlflow needs the package mlflow, which is not installed"),
    ({"plot_loss": "true"}, "plot_loss: true needs matplotlib: .*"),
    (
        SELECT | {"component_params": "{select: {agregate: max}}"},
        r"components: selector 'less': unknown param 'agregate' \(did you mean 'aggregate'\?\); valid: gradient_type, .*",
    ),
    (
        SELECT | {"component_params": "{select: {proj_dim: many}}"},
        "components: selector 'less': proj_dim: expected a whole number, got 'many'",
    ),
    (
        {"train_type": "dynamic_weight", "component_name": "loss", "component_params": "{weight: {dleta: 1}}"},
        r"components: weighter 'loss': unknown param 'dleta' \(did you mean 'delta'\?\); valid: strategy, delta, .*",
    ),
    (
        {"train_type": "dynamic_mix", "component_name": "odd", "components_cfg_file": "odd.yaml", "update_step": "1"},
        r"component_name: no mixer 'odn' \(did you mean 'odm'\?\); registered: doremi, .*",
    ),
    ({"resume_from_checkpoint": "dat"}, r"resume_from_checkpoint: there is no folder 'dat' \(did you mean 'data'\?\)"),
]


@pytest.mark.parametrize(("keys", "line"), NOT_THERE)
def test_what_is_not_there_is_said_before_workers_start(
    run_yaml: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    keys: dict[str, str],
    line: str,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cli, "launch", lambda *args: pytest.fail("too late"))
    monkeypatch.chdir(run_yaml.parent)
    Path("own.yaml").write_text("templates: {mine: {like: qwen}}")
    Path("odd.yaml").write_text("mixers: {odd: {name: odn, params: {}}}")
    assert cli.main(["train", str(run_yaml), *(f"{key}={value}" for key, value in keys.items())]) == 2
    (told,) = [text for text in capsys.readouterr().err.splitlines() if "note:" not in text]
    assert re.fullmatch(f"dataflex: error: {line}", told), told


def test_other_machines_may_have_what_this_one_lacks(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "launch", lambda *args: 7)
    words = ["train", str(run_yaml), "dataset=b"]
    assert [cli.main(words), cli.main([*words, "--hostfile", "hosts"])] == [2, 7]


def test_select_runs_here_without_a_launcher(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "launch", lambda *args: pytest.fail("launched"))
    assert cli.main(["select", str(run_yaml), "select_count=3"]) == 2
    assert "select_from: out has no scores.json" in capfd.readouterr().err


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """A stand-in for the driver that collects the configs it is given."""
    seen: list[Config] = []

    def run(cfg: Config, command: str) -> int:
        assert command == "train"
        seen.append(cfg)
        if cfg.train.seed == 13:
            raise UserError("pool.json:1: bad row")
        return 0

    module = types.ModuleType("dataflex.driver")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dataflex.driver", module)
    monkeypatch.setattr(dataflex, "driver", module, raising=False)
    monkeypatch.setattr("dataflex.worker.end_with_parent", lambda: None)
    return seen


def test_a_worker_runs_the_driver_and_is_quiet_about_what_the_parent_said(
    run_yaml: Path, tmp_path: Path, driver: list[Config], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main(["--local_rank=0", "train", str(run_yaml), "seed=3"]) == 0
    assert driver[0].train.seed == 3
    assert capfd.readouterr().err.count("image_max_pixels") == 1
    monkeypatch.setenv(LAUNCH_DIR, str(tmp_path))
    assert cli.main(["train", str(run_yaml), "--local_rank", "0"]) == 0
    assert capfd.readouterr().err == ""
    assert (tmp_path / "done.0").exists()


def test_a_workers_bad_input_is_one_line_and_code_2(
    run_yaml: Path, driver: list[Config], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main(["train", str(run_yaml), "seed=13"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "dataflex: error: pool.json:1: bad row"


def test_env_shows_versions_and_implementations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataflex import ops

    monkeypatch.setattr(ops, "implementations", lambda: {"some_op": "portable PyTorch"}, raising=False)
    assert cli.main(["env"]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["dataflex"] == dataflex.__version__
    assert facts["some_op"] == "portable PyTorch"
    assert {"python", "torch", "deepspeed", "transformers", "peft", "datasets", "accelerator"} <= set(facts)


@pytest.mark.parametrize(
    ("given", "overrides"),
    [
        (["--seed", "3", "--bf16", "--learning_rate=1e-4"], ["seed=3", "bf16=true", "learning_rate=1e-4"]),
        (["--max-steps", "5", "--do_sample", "false"], ["max_steps=5", "do_sample=false"]),
        (["--freeze_trainable_layers", "-1", "--dry-run"], ["freeze_trainable_layers=-1", "dry_run=true"]),
        (["--master_port", "5000", "--packing"], ["packing=true"]),
    ],
)
def test_a_key_may_be_written_as_a_flag(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], overrides: list[str]
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(cli, "launch", lambda *args: calls.append(args) or 0)
    assert cli.main(["train", str(run_yaml), *given]) == 0
    assert calls[0][1] == ["train", str(run_yaml), *overrides]
