"""`streaming: true` from YAML to a trained model: exact resume, one rank as two, bad rows, and the screen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.config import load_config
from dataflex.driver.check import check
from dataflex.driver.scoring import score
from dataflex.driver.selecting import select
from dataflex.utils.errors import UserError
from tests.distributed import PATIENCE_S, run_ranks
from tests.driver.forked_runs import ForkedRun
from tests.driver.workspace import settings, write_yaml

STREAM = {"streaming": True, "buffer_size": 8, "deepspeed": "ds_zero1.json", "lora_dropout": 0.0}
# Checkpoints lie inside a phase and inside chunks; the ten rows of a pass are gone over several times.
CASES: dict[str, dict[str, Any]] = {
    "static": {"init_mixture_proportions": [3, 1], "max_samples": 10, "save_steps": 3, "max_steps": 8},
    "odm": {
        "train_type": "dynamic_mix",
        "component_name": "odm",
        "update_step": 3,
        "buffer_size": 5,
        "save_steps": 4,
        "max_steps": 9,
    },
    "pt": {"stage": "pt", "dataset": ["text"], "cutoff_len": 48, "save_steps": 5, "max_steps": 8},
}


@pytest.fixture(scope="module")
def found(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank saw, by world size."""
    folder = tmp_path_factory.mktemp("streams")
    rows = [{"instruction": f"q{i}", "output": "a"} for i in range(30)]
    rows[20]["output"] = ["no text"]  # type: ignore[assignment]
    (workspace / "data" / "broken.jsonl").write_text("\n".join(map(json.dumps, rows)))
    info = json.loads((workspace / "data" / "dataset_info.json").read_text())
    info["broken"] = {"file_name": "broken.jsonl"}
    (workspace / "data" / "dataset_info.json").write_text(json.dumps(info))

    def keys(world: int, **changes: Any) -> dict[str, Any]:
        return settings(workspace, **(STREAM | changes), per_device_train_batch_size=4 // world)

    made = {}
    for world in (1, 2):
        cases = {name: keys(world, **case) for name, case in CASES.items()}
        stop = keys(world, dataset=["a", "broken"], max_steps=30, output_dir=str(folder / f"stop-{world}"))
        made[world] = run_ranks(
            "tests.driver.stream_ranks:everything", world, folder=str(folder), cases=cases, broken=stop
        )
    return made


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_bit_identical(found: dict[int, list[dict[str, Any]]], name: str, world: int) -> None:
    runs = found[world][0]["runs"][name]
    whole, resumed = runs["whole"], runs["resumed"]
    done = CASES[name]["save_steps"]
    assert len(whole["losses"]) == CASES[name]["max_steps"]
    assert resumed["losses"] == whole["losses"], "the log of the steps before comes with the checkpoint"
    assert resumed["ids"] == whole["ids"][done:] and resumed["tokens"] == whole["tokens"][done:]
    assert resumed["weights"] == whole["weights"]
    assert resumed["starts"] == whole["starts"][done:], "it begins with the chunks that it stands in"
    assert max(resumed["starts"][0]) > 0


@pytest.mark.parametrize("name", CASES)
def test_one_rank_and_two_train_on_the_same_batches(found: dict[int, list[dict[str, Any]]], name: str) -> None:
    one, two = (found[world][0]["runs"][name]["whole"] for world in (1, 2))
    assert one["ids"] == two["ids"] and one["tokens"] == two["tokens"]
    np.testing.assert_allclose(one["losses"], two["losses"], rtol=1e-5)
    last = [[json.loads(lines.splitlines()[-1]) for lines in run["mixtures"]] for run in (one, two)]
    assert last[0][0]["tokens"] == last[1][0]["tokens"] and sum(last[0][0]["tokens"].values()) > 0


def test_two_ranks_go_on_where_one_has_saved(found: dict[int, list[dict[str, Any]]]) -> None:
    whole, again = found[1][0]["runs"]["odm"]["whole"], found[2][0]["runs"]["odm"]["other"]
    assert again["ids"] == whole["ids"][4:] and again["tokens"] == whole["tokens"][4:] and len(again["ids"]) == 5
    assert again["starts"] == whole["starts"][4:], "every rank reads the streams up to the same place"
    np.testing.assert_allclose(again["losses"], whole["losses"], rtol=1e-5)


def test_the_mixture_is_as_asked_and_passes_repeat_the_rows(found: dict[int, list[dict[str, Any]]]) -> None:
    run = found[1][0]["runs"]["static"]["whole"]
    domains = np.array(run["ids"]) % 2
    assert np.bincount(domains.ravel()).tolist() == [24, 8]
    rows = [tuple(row) for step in run["tokens"] for row in step]
    assert len(set(rows)) == 10 + 8, "ten rows of the one in 2.4 passes, eight of the other's ten"
    line = json.loads(run["mixtures"][0].splitlines()[-1])
    assert line["samples"] == {"a": 24, "b": 8} and line["epochs"] == {"a": 2.4, "b": 0.0}
    assert line["tokens"]["a"] + line["tokens"]["b"] == sum(map(len, rows))


@pytest.mark.parametrize("world", [1, 2])
def test_a_bad_row_stops_every_rank_at_the_same_step(found: dict[int, list[dict[str, Any]]], world: int) -> None:
    stops = [rank["stopped"] for rank in found[world]]
    assert len(stops) == world and all(stop["steps"] == stops[0]["steps"] != [] for stop in stops)
    for stop in stops:
        assert re.search(r"broken\.jsonl:21: output: expected text, got list \['no text'\]$", stop["error"])


def test_a_run_from_the_command_line_says_what_it_does(workspace: Path) -> None:
    keys = STREAM | {"eval_dataset": ["target"], "eval_strategy": "steps", "eval_steps": 4, "dataloader_num_workers": 2}
    config = write_yaml(workspace, "stream.yaml", **keys, output_dir=str(workspace / "stream"))
    run = ForkedRun(["train", str(config)], 1)
    text = run.end(PATIENCE_S)
    assert run.returncode == 0, text
    lines = text.splitlines()[1:]
    assert re.match(r"a: streamed \(a\.json, [\d.]+ KiB\), shuffled 8 rows at a time$", lines[1]), lines[:4]
    assert lines[0].endswith("dataloader_num_workers: not used: streams are read in the training process")
    assert "  Num examples = not known (streamed)" in lines
    assert "step 0: static mixes a 50.0%, b 50.0%" in lines
    assert [line for line in lines if re.match(r"step 4/4 loss \S+ grad_norm \S+ lr \S+ remaining", line)]
    assert not re.search(r"warning|\[deepspeed\]|it/s\]|%\|", text, re.I)
    assert "| a | streamed | streamed |" in (workspace / "stream" / "README.md").read_text()
    assert "epoch" not in json.loads((workspace / "stream" / "all_results.json").read_text())


@pytest.mark.parametrize(("name", "command"), [("check", check), ("score", score), ("select", select)])
def test_commands_that_need_all_samples_refuse_streams(workspace: Path, name: str, command: Any) -> None:
    cfg = load_config(settings(workspace, **STREAM, score_token_losses=True), quiet=True)
    with pytest.raises(UserError, match=f"streaming: dataflex-cli {name} needs all samples at hand"):
        command(cfg)
