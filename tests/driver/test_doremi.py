"""`dataflex-cli doremi`: three runs in one launch, taken up where they stopped; and what it refuses."""

from __future__ import annotations

import json
import signal
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflex.config import load_config
from dataflex.driver import doremi as command
from dataflex.driver import training
from dataflex.driver.doremi import three_runs
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.stopping import Stop, Stopped
from tests.distributed import run_ranks
from tests.driver.workspace import settings

RUN: dict[str, Any] = {
    "finetuning_type": "full",
    "train_type": "dynamic_mix",
    "component_name": "doremi",
    "update_step": 2,
    "max_steps": None,
    "train_step": 6,
    "proxy_train_step": 4,
    "warn_domain_epochs": 1.0,
}


def stopped_and_taken_up(folder: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Stop in the middle of the proxy run, go on, start the finished thing again, and with another learning rate."""
    cfg = load_config(keys, quiet=True)
    folders: list[str] = []
    train = training.train

    def counted(one: Any) -> None:
        folders.append(Path(one.output.output_dir).name)
        train(one)

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    command.train = counted
    finish = training._finish
    try:
        training._finish = lambda inputs, *rest: (
            stop() if Path(inputs.cfg.output.output_dir).name == "proxy" else finish(inputs, *rest)
        )
        with pytest.raises(Stop):
            three_runs(cfg)
        training._finish = finish
        dist.barrier()
        three_runs(cfg)
        three_runs(cfg)
        try:
            three_runs(load_config(keys | {"learning_rate": 1.0}, quiet=True))
        except UserError as exc:
            return {"folders": folders, "error": str(exc)}
        return {"folders": folders, "error": "nothing"}
    except Exception:
        return {"folders": folders, "error": traceback.format_exc()}
    finally:
        command.train, training._finish = train, finish


def test_it_goes_on_at_the_unfinished_run(workspace: Path) -> None:
    keys = settings(workspace, **RUN, output_dir=str(workspace / "three"), save_steps=2)
    results = run_ranks("tests.driver.test_doremi:stopped_and_taken_up", 2, 400, folder=str(workspace), keys=keys)
    for result in results:
        assert result["folders"] == ["reference", "proxy", "proxy", "final"]
        assert "holds a finished run with another learning_rate (0.001, here 1.0)" in result["error"]
    out = workspace / "three"
    found = json.loads((out / "proxy" / "doremi_average_weights.json").read_text())
    lines = [json.loads(line) for line in (out / "proxy" / "doremi_weights.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4] and found["update_times"] == 4
    assert found["average_weights"] == lines[-1]["average_weights"] != [0.5, 0.5]
    final = yaml.safe_load((out / "final" / "config.yaml").read_text())
    assert final["init_mixture_proportions"] == found["average_weights"] and final["train_step"] == 6
    reference = yaml.safe_load((out / "reference" / "config.yaml").read_text())
    assert reference["train_step"] == 4 and "component_name" not in reference
    assert all((out / name / "all_results.json").exists() for name in ("reference", "proxy", "final"))


def test_weights_are_by_name_whatever_their_order_in_the_file(tmp_path: Path) -> None:
    found = {"domain_names": ["b", "a"], "average_weights": [0.75, 0.25], "update_times": 2}
    (tmp_path / command.RESULT).write_text(json.dumps(found))
    assert command._read_weights(tmp_path, ("a", "b")) == [0.25, 0.75]


def test_a_revision_is_of_the_model_and_not_of_the_proxy(workspace: Path) -> None:
    keys = settings(workspace, **RUN, output_dir="three", model_revision="v2")
    of = command._small(load_config(keys | {"proxy_model_name_or_path": "proxy"}, quiet=True)).model
    assert (of.model_name_or_path, of.model_revision) == ("proxy", "main")
    assert command._small(load_config(keys, quiet=True)).model.model_revision == "v2"


NAMES = b'{"domain_names": ["a", "b"], "average_weights": '


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 99_999,
        *(NAMES + end for end in (b"[1]}", b"[0, 0]}", b'["1", 0]}', b"[NaN, 1]}")),
    ],
)
def test_damaged_mean_weights_are_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / command.RESULT).write_bytes(content)
    with pytest.raises(UserError, match=rf"^{tmp_path}[^\n]*{command.RESULT}[^\n]+$"):
        command.read_weights(tmp_path, ("a", "b"))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"component_name": "odm"}, "component_name: dataflex-cli doremi needs the mixer doremi, got 'odm'"),
        ({"static_mix": True}, "train_type: dataflex-cli doremi needs dynamic_mix, without static_mix"),
        ({"reference_model_path": "runs/x"}, "reference_model_path: dataflex-cli doremi trains the reference itself"),
    ],
)
def test_what_is_no_doremi_run_is_refused(workspace: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        three_runs(load_config(settings(workspace, **{**RUN, **changes}), quiet=True))


def test_a_signal_too_late_for_one_run_ends_before_the_next(monkeypatch: pytest.MonkeyPatch, workspace: Path) -> None:
    stop = Stop(heeds=True)
    stop._note(signal.SIGTERM)
    cfg = load_config(settings(workspace), quiet=True)
    monkeypatch.setattr(command, "train", lambda _: stop)
    with pytest.raises(Stopped, match=r"^stopped after the proxy run \(SIGTERM\); the same command goes on with the"):
        command._stage("proxy", cfg)
    command._stage("final", cfg)
