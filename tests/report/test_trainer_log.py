"""The lines of the log and the results by hand: means, rates, epochs, the time that is left."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataflex.core import clock as clocks
from dataflex.core.clock import DECIDE, EVALUATE, PARTS, SCORE
from dataflex.report.trainer_log import LogHook, read_log

LOSSES = [1.0, 2.0, 6.0, float("nan"), 4.0, 5.0, 7.0, 8.0]
STEP_S, POOL = 2.0, 60
MICRO, ACCUMULATION, WORLD = 2, 3, 4


class Clock:
    """A step takes two seconds, of which a quarter is scoring of ten samples."""

    def __init__(self, run: Any) -> None:
        self.run = run

    @property
    def total(self) -> float:
        return STEP_S * self.run.step

    @property
    def seconds(self) -> dict[str, float]:
        return dict.fromkeys(PARTS, 0.0) | {"train": 1.5 * self.run.step, "score": 0.5 * self.run.step}

    @property
    def scored(self) -> int:
        return 10 * self.run.step


def logged(folder: Path) -> tuple[LogHook, Any]:
    """A run of eight steps, logged at 3, 6 and 8."""
    engine = SimpleNamespace(
        get_lr=lambda: [0.1 / (run.step + 1)],
        get_global_grad_norm=lambda: run.step / 2,
        skipped_steps=0,
        monitor=SimpleNamespace(enabled=False),
    )
    run: Any = SimpleNamespace(
        step=0, total_steps=8, loss=0.0, figures={}, output_dir=folder, is_main=True, engine=engine,
        pool=SimpleNamespace(size=POOL), micro_batch=MICRO, accumulation=ACCUMULATION, world_size=WORLD,
        global_batch=MICRO * ACCUMULATION * WORLD,
    )  # fmt: skip
    log = LogHook(3)
    log.on_train_start(run)
    run.clock = Clock(run)
    for loss in LOSSES:
        batch = SimpleNamespace(sample_ids=range(run.global_batch))
        log.on_step_start(run, batch)
        run.step, run.loss, run.figures = run.step + 1, loss, {"weight_mean": 0.25}
        log.on_step_end(run, batch)
    log.on_train_end(run)
    return log, run


def test_the_lines_by_hand(tmp_path: Path) -> None:
    log, _ = logged(tmp_path)
    lines = read_log(tmp_path)
    assert lines == log.history == json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [line["current_steps"] for line in lines] == [3, 6, 8]
    assert [line["loss"] for line in lines] == [3.0, 4.5, 7.5], "a loss that is not finite is left out of its mean"
    assert [line["lr"] for line in lines] == pytest.approx([0.1 / 3, 0.1 / 6, 0.1 / 8])
    assert [line["epoch"] for line in lines] == pytest.approx([72 / 60, 144 / 60, 192 / 60])
    assert [line["percentage"] for line in lines] == [37.5, 75.0, 100.0]
    assert [line["elapsed_time"] for line in lines] == ["0:00:06", "0:00:12", "0:00:16"]
    assert [line["remaining_time"] for line in lines] == ["0:00:10", "0:00:04", "0:00:00"]
    assert [line["grad_norm"] for line in lines] == [1.5, 3.0, 4.0]
    assert {line["weight_mean"] for line in lines} == {0.25}


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff" * 9, b'{"current_steps": 9}\n'])
def test_a_resume_writes_the_log_anew_whatever_it_holds(tmp_path: Path, content: bytes | None) -> None:
    log, run = logged(tmp_path)
    lines, path = read_log(tmp_path), tmp_path / "trainer_log.jsonl"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    again = LogHook(3)
    run.clock = Clock(run)
    again.load_state_dict(json.loads(json.dumps(log.state_dict())))
    again.on_train_start(run)
    assert read_log(tmp_path) == lines and len(lines) == 3


def test_the_results_by_hand(tmp_path: Path) -> None:
    log, run = logged(tmp_path)
    found = log.summary(run)
    expected = {
        "train_loss": 33 / 7,
        "epoch": 3.2,
        "train_runtime": 16.0,
        "train_samples_per_second": 8 * 24 / 16,
        "train_steps_per_second": 0.5,
        "training_seconds": 12.0,
        "selection_seconds": 4.0,
        "score_seconds": 4.0,
        "samples_scored": 80,
        "samples_scored_per_second": 20.0,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"], state["epoch"]) == (8, 8, 3.2)


def test_what_selection_cost_is_the_sum_over_all_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(clocks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    log, run = logged(tmp_path)
    for seconds in ((7, 2, 4, 1), (5, 3, 6, 9)):  # training, deciding, scoring within it, evaluating
        again = LogHook(3)
        again.load_state_dict(json.loads(json.dumps(log.state_dict())))
        now[0] += 1000
        again.on_train_start(run)
        now[0] += seconds[0]
        with again.clock.part(DECIDE):
            now[0] += seconds[1]
            with again.clock.part(SCORE):
                now[0] += seconds[2]
                again.clock.add_scored(20)
        with again.clock.part(EVALUATE):
            now[0] += seconds[3]
        log = again
    found = log.summary(run)
    assert (found["training_seconds"], found["selection_seconds"]) == (12.0, 15.0)
    assert (found["score_seconds"], found["decide_seconds"], found["evaluate_seconds"]) == (10.0, 5.0, 10.0)
    assert (found["samples_scored"], found["samples_scored_per_second"]) == (40, 4.0)
