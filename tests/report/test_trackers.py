"""SwanLab, MLflow and Trackio are told what a run logs, by rank 0; their packages are stood in for here."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dataflex.config import load_config
from dataflex.config.trackers import reported_to
from dataflex.engine.ds_config import check_possible
from dataflex.report.trackers import trackers
from dataflex.report.trainer_log import LogHook
from dataflex.utils.errors import UserError

CALLS = ("init", "log", "finish", "set_experiment", "start_run", "log_params", "log_metrics", "end_run")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was called, as (package.function, arguments)."""
    calls: list[Any] = []
    for package in ("swanlab", "mlflow", "trackio"):
        module = ModuleType(package)
        for name in CALLS:
            note = f"{package}.{name}"
            setattr(module, name, lambda *given, _n=note, **named: calls.append((_n, *given, named)))
        monkeypatch.setitem(sys.modules, package, module)
    return calls


def run_of(rank: int) -> Any:
    engine = SimpleNamespace(monitor=SimpleNamespace(enabled=False))
    return SimpleNamespace(is_main=rank == 0, output_dir=None, engine=engine, step=7, total_steps=9, global_batch=4)


def logged(rank: int, **keys: Any) -> None:
    cfg = load_config({"seed": 3, **keys}, embedded=True, quiet=True)
    log = LogHook(1, lambda: trackers(cfg, cfg.output.report_to))
    log.on_train_start(run_of(rank))
    log.add(run_of(rank), {"current_steps": 7, "eval_a:b_loss": 1.5})
    log.close()
    log.close()


def test_each_package_is_started_told_and_ended(told: list[Any]) -> None:
    options = {"swanlab": {"project": "p", "mode": "offline"}, "mlflow": {"experiment_name": "e"}}
    logged(0, report_to="swanlab,mlflow,trackio", run_name="mine", tracker_options=options)
    started = {name: named for name, *_, named in told if name.endswith(".init")}
    assert started["swanlab.init"].pop("config")["seed"] == 3
    assert started["trackio.init"].pop("config")["seed"] == 3
    assert started == {
        "swanlab.init": {"project": "p", "name": "mine", "mode": "offline"},
        "trackio.init": {"project": "dataflex", "name": "mine", "resume": "allow"},
    }
    params = [call for call in told if call[0] == "mlflow.log_params"]
    assert all(len(given) <= 100 for _, given, _ in params) and params[0][1]["seed"] == "3"
    rest = [call for call in told if not call[0].endswith((".init", "log_params"))]
    assert rest == [
        ("mlflow.set_experiment", "e", {}),
        ("mlflow.start_run", {"run_name": "mine"}),
        ("swanlab.log", {"eval_a:b_loss": 1.5}, {"step": 7}),
        ("mlflow.log_metrics", {"eval_a_b_loss": 1.5}, {"step": 7}),
        ("trackio.log", {"eval_a:b_loss": 1.5}, {"step": 7}),
        ("trackio.finish", {}),
        ("mlflow.end_run", {}),
        ("swanlab.finish", {}),
    ]


def test_other_ranks_tell_nothing(told: list[Any]) -> None:
    logged(1, report_to="swanlab,mlflow,trackio")
    assert told == []


def test_a_package_that_is_missing_is_named_and_all_are_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"tensorboard", "mlflow"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in there else None)
    cfg = load_config({"report_to": "all"}, embedded=True, quiet=True)
    assert reported_to(cfg) == ("tensorboard", "mlflow")
    check_possible(cfg)
    assert cfg.notes == ()
    there.clear()
    cfg = load_config({"report_to": "all"}, embedded=True, quiet=True)
    every = "tensorboard, wandb, comet_ml, swanlab, mlflow, trackio"
    assert cfg.notes == (f"config:report_to: all: none of {every} is installed, so nothing is reported",)
    cfg = load_config({"report_to": "trackio"}, embedded=True, quiet=True)
    with pytest.raises(UserError, match="report_to: trackio needs the package trackio, which is not installed"):
        check_possible(cfg)
