"""What a run leaves to read: the model card, the loss plot, the closing screen."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from dataflex.config import Config, load_config
from dataflex.core.packing import Packing
from dataflex.core.plan import epoch_schedule
from dataflex.data.pool import Pool
from dataflex.report.model_card import model_card
from dataflex.report.plot import plot_loss
from dataflex.report.summary import closing_lines, cost_lines, opening_lines, read_decisions, told_apart
from dataflex.report.trainer_log import read_log
from dataflex.utils.errors import UserError

POOL = Pool(range(4), np.array([0, 0, 0, 1]), ["maths", "poems"], np.array([5, 6, 7, 1000]), fingerprint="f00d")
RUN = SimpleNamespace(step=30, micro_batch=2, accumulation=3, world_size=4, global_batch=24, packing=None)
HISTORY = [
    {"current_steps": 0, "eval_loss": 3.0},
    {"current_steps": 10, "loss": 2.5},
    {"current_steps": 20, "loss": 1.5},
    {"current_steps": 20, "eval_loss": 2.0},
]


def _config(tmp_path: Path, **changes: Any) -> Config:
    keys = {"model_name_or_path": "org/base", "dataset": ["maths", "poems"], "output_dir": "runs/mine"} | changes
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(keys))
    return load_config(path, quiet=True)


def _head(card: str) -> dict[str, Any]:
    head: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return head


def test_the_first_screen_counts_packs_where_samples_are_packed() -> None:
    run: Any = SimpleNamespace(**vars(RUN), total_steps=7, schedule=epoch_schedule(7, 7), pool=POOL)
    first = opening_lines(run, "static", 2)
    assert not [line for line in first if "pack" in line]
    assert "  Examples trained on = 168 (42.00 x 4)" in first, "7 steps of 24"
    run.packing = Packing(np.array([5, 6, 7, 2]), 10)
    lines = opening_lines(run, "static", 2)
    assert lines[1:5] == [
        "  Num examples = 4",
        "  Num packs = 3 of up to 10 tokens (66.7% full, 1.3 samples each)",
        "  Batch size per device = 2 packs",
        "  Gradient accumulation steps = 3",
    ]
    assert "  Total train batch size (x 4 processes) = 24 packs" in lines
    assert "  Packs trained on = 168 (56.00 x 3)" in lines


def test_the_model_card_says_what_it_is_made_from_and_how_it_went(tmp_path: Path) -> None:
    card = model_card(_config(tmp_path, lora_rank=4, bf16=True), RUN, POOL, {"train_loss": 1.5, "eval_loss": 2.0})
    assert _head(card)["base_model"] == "org/base"
    assert _head(card)["library_name"] == "peft"
    for line in (
        "# mine",
        "Trained from the weights of `org/base` by LoRA (stage sft).",
        "| maths | 3 | 18 |",
        "| poems | 1 | 1,000 |",
        "| global batch | 2 x 3 x 4 = 24 samples |",
        "| precision | bf16 |",
        "| lora_rank | 4 |",
        "| lora_alpha | 8 |",
        "| eval_loss | 2 |",
    ):
        assert line in card.splitlines()
    assert "| deepspeed | " in card and "More Information" not in card


def test_the_model_card_of_a_model_from_scratch_names_no_base(tmp_path: Path) -> None:
    changes = {"train_from_scratch": True, "finetuning_type": "full", "stage": "pt", "run_name": "first try"}
    card = model_card(_config(tmp_path, **changes), RUN, POOL, {})
    assert "base_model" not in _head(card)
    assert "# first try" in card
    assert "Trained from random weights of the architecture `org/base` by full finetuning (stage pt)." in card
    assert "lora_rank" not in card


def test_the_plot_is_a_picture_with_as_many_marks_as_decisions(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
        plot_loss(HISTORY, [10, 20], tmp_path / "loss.png", "sample")
    axes = figures[0].axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["training", "evaluation", "decision"]
    assert axes.get_ylabel() == "loss per sample (nats)"
    assert [list(line.get_xdata()) for line in axes.lines] == [[10, 20], [0, 20], [10, 10], [20, 20]]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_closing_screen_sets_choices_against_the_pool(tmp_path: Path) -> None:
    (tmp_path / "decisions").mkdir()
    for step, indices in ((10, [0, 1]), (2, [3, 3, 3, 0])):
        record = {"step": step, "component": "less", "indices": indices}
        (tmp_path / f"decisions/step_{step}.json").write_text(json.dumps(record))
    (tmp_path / "config.yaml").write_text("")
    lines = closing_lines(tmp_path, POOL, HISTORY)
    assert lines[0] == "what less chose, as shares of each decision:"
    assert lines[1].split() == ["domain", "pool", "step", "2", "step", "10"]
    assert lines[2].split() == ["maths", "75.0%", "25.0%", "100.0%"]
    assert lines[3].split() == ["poems", "25.0%", "75.0%", "0.0%"]
    assert "training loss: 2.5000 at step 10, 1.5000 at step 20" in lines
    assert "eval loss: 3.0000 at step 0, 2.0000 at step 20" in lines
    assert [line.split()[0] for line in lines[-3:]] == [
        "config.yaml",
        "decisions/step_2.json",
        "decisions/step_10.json",
    ]


def test_the_closing_screen_has_the_worst_losses_of_the_subtasks(tmp_path: Path) -> None:
    losses = {f"eval_task_{name}_loss": loss for name, loss in zip("abcdefgh", [3, 9, 1, 7, 2, 8, 5, 4], strict=True)}
    history = [{"current_steps": 0, "eval_loss": 9.0}, {"current_steps": 4, "eval_loss": 2.5, **losses}]
    history.append({"current_steps": 5, "loss": 1.0})
    (tmp_path / "config.yaml").write_text("")
    lines = closing_lines(tmp_path, POOL, history)
    assert lines[2] == (
        "eval losses at step 4, worst first: task_b 9.0000, task_f 8.0000, task_d 7.0000, task_g 5.0000, "
        "task_h 4.0000, task_a 3.0000, 2 lower ones in all_results.json"
    )
    few = [{"current_steps": 4, "eval_loss": 2.5, "eval_x_loss": 2.0, "eval_y_loss": 3.0}]
    assert closing_lines(tmp_path, POOL, few)[1] == "eval losses at step 4, worst first: y 3.0000, x 2.0000"


@pytest.mark.parametrize(
    ("pair", "shown"),
    [
        ((0.5, 1.0), ("0.5", "1")),
        ((0.9996, 0.9999), ("0.9996", "0.9999")),
        ((1 - 1e-9, 1.0), ("0.999999999", "1")),
        ((0.25, 0.25), ("0.25", "0.25")),
        ((-123.44, 123.46), ("-123", "123")),
        ((float("nan"), 1.0), ("nan", "1")),
    ],
)
def test_numbers_have_the_digits_that_tell_them_apart(pair: tuple[float, float], shown: tuple[str, str]) -> None:
    assert told_apart(*pair) == shown


def test_the_last_six_decisions_are_shown(tmp_path: Path) -> None:
    (tmp_path / "decisions").mkdir()
    for step in range(1, 9):
        record = {"step": step, "component": "less", "indices": [step % 2 * 3]}
        (tmp_path / f"decisions/step_{step}.json").write_text(json.dumps(record))
    lines = closing_lines(tmp_path, POOL, [])
    assert lines[1].split() == ["domain", "pool", *(word for step in range(3, 9) for word in ("step", str(step)))]
    assert lines[2].split() == ["maths", "75.0%", *["0.0%", "100.0%"] * 3]


def test_whom_the_picks_serve_is_shown_where_the_target_has_several_subtasks(tmp_path: Path) -> None:
    (tmp_path / "decisions").mkdir()
    for step, shares in ((2, {"adding": 0.75, "sorting": 0.25}), (10, {"adding": 1.0, "sorting": 0.0})):
        tasks = {name: {"picks": round(4 * share), "share": share} for name, share in shares.items()}
        record = {"step": step, "component": "less", "indices": [0, 1, 2, 3], "subtasks": tasks}
        (tmp_path / f"decisions/step_{step}.json").write_text(json.dumps(record))
    lines = closing_lines(tmp_path, POOL, [])
    at = lines.index("which subtask of the target the picks serve:")
    assert [line.split() for line in lines[at + 1 : at + 4]] == [
        ["subtask", "step", "2", "step", "10"],
        ["adding", "75.0%", "100.0%"],
        ["sorting", "25.0%", "0.0%"],
    ]


def test_many_files_of_a_kind_are_one_line(tmp_path: Path) -> None:
    for step in range(2, 14, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "notes.txt").write_text("the user's")
    assert closing_lines(tmp_path, POOL, [])[1:] == ["  checkpoint-2 ... checkpoint-12 (6)  the state after that step"]


def test_the_closing_screen_says_what_selection_cost(tmp_path: Path) -> None:
    results = {"training_seconds": 1234.56, "selection_seconds": 78.9}
    (tmp_path / "all_results.json").write_text(json.dumps(results))
    assert closing_lines(tmp_path, POOL, [])[0] == "time: training 1,234.6 s, selection 78.9 s"
    results |= {"samples_scored": 2064, "samples_scored_per_second": 26.159}
    (tmp_path / "all_results.json").write_text(json.dumps(results))
    assert cost_lines(tmp_path) == ["time: training 1,234.6 s, selection 78.9 s (2,064 samples scored, 26.2/s)"]


@pytest.mark.parametrize("content", ["{", "[]", '{"selection_seconds": "long"}'])
def test_results_that_are_none_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "all_results.json").write_text(content)
    with pytest.raises(UserError, match=r"all_results\.json: not the results of a run: .*; move it away"):
        cost_lines(tmp_path)


def test_the_closing_screen_of_a_run_without_decisions_or_logs_is_short(tmp_path: Path) -> None:
    assert closing_lines(tmp_path, POOL, []) == [f"run folder: {tmp_path}"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"step": 10, "component": "less", "indices": [0, 1', "cannot be read as JSON"),
        ('{"step": "10", "component": "less", "indices": [{}]}', "step_10.json: "),
        ('{"step": 10, "component": "less", "indices": [0, 4]}', "sample 4 is not in the pool"),
        ('{"step": 10, "component": "less", "indices": [0, -1]}', "sample -1 is not in the pool"),
        ('{"step": 10, "component": "odm", "proportions": {"maths": 1.0}}', "it has no proportion of 'poems'"),
        ('{"step": 10, "component": "odm"}', "it has no proportion of 'maths'"),
    ],
)
def test_a_damaged_record_of_a_decision_is_named(tmp_path: Path, content: str, why: str) -> None:
    (tmp_path / "decisions").mkdir()
    (tmp_path / "decisions" / "step_10.json").write_text(content)
    with pytest.raises(UserError, match=r"step_10.json: not a record of a decision: .*move it away to go on") as told:
        read_decisions(tmp_path, POOL)
    assert why in str(told.value)


def test_a_damaged_log_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "trainer_log.jsonl").write_text('{"current_steps": 1, "loss": 2.5}\n{"current_steps": \n')
    with pytest.raises(UserError, match="line 2 of trainer_log.jsonl cannot be read as JSON"):
        read_log(tmp_path)
