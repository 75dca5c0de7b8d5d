"""A resume takes back all of a run: hooks, random states, losses not yet logged, and every file of its folder."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dataflex
from dataflex.core.hook import Hook
from dataflex.engine.checkpoint.split import Split
from dataflex.engine.checkpoint.state import check_identity, random_state, state_of
from dataflex.engine.folder import run_folder
from dataflex.report.trainer_log import LogHook, read_log
from dataflex.train.trainer.run_hooks import EvalHook
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.distributed import run_ranks
from tests.driver.run_files import contents, plain
from tests.engine.test_checkpoint import REFUSALS
from tests.tiny import tiny_llama

# Decided at 2 and 5, logged at 3, 6 and 8, evaluated at 0, 4 and 8. Saved at 4 and 7: inside a phase and a log window.
STEPS, WARMUP, LOGGED, SAVED, ENDED = 8, 2, [3, 6, 8], (4, 7), 6
SIZES = {"short": 20, "long": 30, "few": 12}
KINDS: dict[str, dict[str, Any]] = {
    "doremi": {"train_type": "dynamic_mix", "component_name": "doremi"},
    "moe": {"train_type": "dynamic_mix", "component_name": "dynamic_moe"},
    "combined": {
        "train_type": ["dynamic_select", "dynamic_mix", "dynamic_weight"],
        "component_name": {"select": "loss", "mix": "odm", "weight": "adapt"},
    },
}


class Noise(Hook):
    """Draws from every global generator of every rank at each step and lets the log say what came."""

    def on_step_end(self, run: Any, batch: Any) -> None:
        drawn = [random.random(), float(np.random.random()), float(torch.rand(()))]
        sums = np.sum(dist.gather_objects(drawn), axis=0)
        run.figures |= dict(zip(("python", "numpy", "torch"), sums.tolist(), strict=True))


def build(kind: str, folder: Path) -> Any:
    log = LogHook(3)
    reference = {"reference_model_path": str(folder.parent / "reference")} if kind == "doremi" else {}
    return dataflex.initialize(
        model=tiny.model("moe" if kind == "moe" else "full", attention_dropout=0.2),
        config=tiny.ds_config(2, micro_batch=2, accumulation=2),
        dataflex={
            **KINDS[kind],
            **reference,
            "output_dir": str(folder),
            "warmup_step": WARMUP,
            "update_step": 3,
            "update_times": 2,
        },
        train_dataset={name: tiny.samples(size, seed=size) for name, size in SIZES.items()},
        eval_dataset=tiny.samples(3, seed=1),
        tokenizer=tiny.PadZero(),
        hooks=[Noise(), log, EvalHook(4, log)],
    )


def snapshot(engine: Any) -> dict[str, Any]:
    """All that the engine would save but the time, and this rank's random states."""
    return plain(
        {
            **state_of(engine._loop),
            "random": random_state(),
            "rate": engine.get_lr(),
            "engine": [engine.global_steps, engine.global_samples],
            "parameters": tiny.parameter_hash(engine),
        }
    )


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two nested values differ."""
    if isinstance(a, dict) and isinstance(b, dict) and set(a) == set(b):
        return [place for key in a for place in differences(a[key], b[key], f"{at}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [place for i, (x, y) in enumerate(zip(a, b, strict=True)) for place in differences(x, y, f"{at}.{i}")]
    return [] if repr(a) == repr(b) else [at]


def train(engine: Any, states: dict[int, Any], copy_to: Path | None = None) -> list[float]:
    """The steps' losses; keeps a snapshot of each, saves, and copies the folder as it is when the run might end."""
    losses = []
    for batch in engine.batches():
        losses.append(engine.training_step(batch))
        states[engine.run.step] = snapshot(engine)
        if engine.run.step in SAVED:
            engine.save_checkpoint()
        if copy_to is not None and engine.run.step == ENDED and dist.is_main():
            shutil.copytree(engine.run.output_dir, copy_to)
    return losses


def resumed(kind: str, folder: Path, start: Path, states: dict[int, Any]) -> dict[str, Any]:
    """A run that goes on from ``start`` in a process whose random states are others; where it is another run."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1234 + dist.rank())
    engine = build(kind, folder)
    engine.load_checkpoint(start.parent, tag=start.name)
    run_folder.go_on(folder, start, engine.run)
    step = engine.run.step
    taken = differences(snapshot(engine), states[step])
    later: dict[int, Any] = {}
    losses = train(engine, later)
    differ = {now: differences(later[now], states[now]) for now in later}
    return {"taken": taken, "later": differ, "losses": losses, "step": step}


def run(kind: str, home: Path) -> dict[str, Any]:
    if dist.is_main():
        tiny_llama(initializer_range=0.02, seed=1).save_pretrained(home / "reference")
    dist.barrier()
    states: dict[int, Any] = {}
    engine = build(kind, home / "whole")
    losses = train(engine, states, copy_to=home / "same")
    plans = [states[step]["sample_ids"] for step in (WARMUP, 5, STEPS)]
    return {
        "losses": losses,
        "same": resumed(kind, home / "same", home / "same/checkpoint-4", states),
        "copy": resumed(kind, home / "copy", home / "whole/checkpoint-7", states),
        "plans": plans,
        "lengths": engine.run.pool.lengths.tolist(),
        "domains": engine.run.pool.domain_ids.tolist(),
        "planner": {step: states[step]["hooks"][0] for step in states},
        "random": states[STEPS]["random"],
        "identity": states[STEPS]["identity"],
    }


def everything(folder: str) -> dict[str, Any]:
    return {kind: run(kind, Path(folder, kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resumed_state")


@pytest.fixture(scope="module")
def ranks(home: Path) -> list[dict[str, Any]]:
    return run_ranks("tests.engine.test_resumed_state:everything", 2, folder=str(home))


@pytest.mark.parametrize("where", ["same", "copy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_takes_back_every_state_on_every_rank(kind: str, where: str, ranks: Any) -> None:
    for rank in ranks:
        found = rank[kind][where]
        assert found["taken"] == []
        assert list(found["later"]) == [str(step) for step in range(found["step"] + 1, STEPS + 1)]
        assert not any(found["later"].values()), found["later"]
        assert found["losses"] == rank[kind]["losses"][found["step"] :]


@pytest.mark.parametrize("where", ["same", "copy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_folder_has_every_file_of_the_whole_run(kind: str, where: str, home: Path, ranks: Any) -> None:
    whole, other = (contents(home / kind / name) for name in ("whole", where))
    if where == "copy":  # what was saved before lies in the folder that it goes on from
        saved = ("checkpoint-", "latest", "zero_to_")
        whole = {name: value for name, value in whole.items() if not name.startswith(saved)}
    assert set(other) ^ set(whole) == set()
    assert [name for name in whole if other[name] != whole[name]] == []
    expected = {
        "doremi": {"doremi_weights.jsonl", "doremi_average_weights.json", "weights.jsonl", "decisions/step_5.json"},
        "moe": {"dynamic_moe_weights.jsonl", "decisions/step_2.json"},
        "combined": {"odm_weights.jsonl", "weights.jsonl", "decisions/step_2.parquet", "decisions/step_5.json"},
    }
    assert expected[kind] | {"trainer_log.jsonl", "trainer_state.json"} <= set(other)


@pytest.mark.parametrize("where", ["whole", "same", "copy"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_log_has_the_mean_of_all_losses_since_the_line_before(
    kind: str, where: str, home: Path, ranks: Any
) -> None:
    losses = ranks[0][kind]["losses"]
    lines = [line for line in read_log(home / kind / where) if "loss" in line]
    assert [line["current_steps"] for line in lines] == LOGGED
    means = [np.mean(losses[:3]), np.mean(losses[3:6]), np.mean(losses[6:])]
    np.testing.assert_allclose([line["loss"] for line in lines], means, rtol=1e-12)


@pytest.mark.parametrize("where", ["same", "copy"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_samples_are_those_of_the_plans(kind: str, where: str, home: Path, ranks: Any) -> None:
    found = ranks[0][kind]
    ids = np.concatenate([np.array(plan) for plan in found["plans"]])
    assert len(ids) == STEPS * 8
    domains, lengths = np.array(found["domains"]), np.array(found["lengths"])
    last = lines_of(home / kind / where, kind)[-1]
    assert last["step"] == STEPS
    assert list(last["samples"].values()) == np.bincount(domains[ids], minlength=3).tolist()
    assert list(last["tokens"].values()) == np.bincount(domains[ids], lengths[ids], minlength=3).tolist()


@pytest.mark.parametrize("where", ["same", "copy"])
def test_doremis_result_is_the_mean_over_every_step_since_the_warmup(where: str, home: Path, ranks: Any) -> None:
    mixers = [ranks[0]["doremi"]["planner"][str(step)]["mixer"] for step in range(1, STEPS + 1)]
    weights = np.array([mixer["weights"] for mixer in mixers[WARMUP:]])
    assert [mixer["steps"] for mixer in mixers] == [0, 0, 1, 2, 3, 4, 5, 6] and np.ptp(weights, axis=0).min() > 0
    result = json.loads((home / "doremi" / where / "doremi_average_weights.json").read_text())
    assert result["domain_names"] == list(SIZES) and result["update_times"] == STEPS - WARMUP
    np.testing.assert_allclose(result["average_weights"], weights.mean(0), rtol=1e-12)


@pytest.mark.parametrize("where", ["same", "copy"])
def test_the_experts_distances_are_still_those_of_the_last_decision(where: str, home: Path, ranks: Any) -> None:
    """By hand: w <- (1 - c) softmax(log w + eta distance) + c / 3, from equal weights."""
    lines = {line["step"]: line for line in lines_of(home / "moe" / where, "moe")}
    assert list(lines) == [0, 2, 5, 8]
    weights = np.full(3, 1 / 3)
    for step in (2, 5):
        moved = weights * np.exp(10 * np.array(list(lines[step]["distances"].values())))
        weights = 0.95 * moved / moved.sum() + 0.05 / 3
        np.testing.assert_allclose(list(lines[step]["weights"].values()), weights, rtol=1e-9)
    assert lines[8]["distances"] == lines[5]["distances"] and max(lines[8]["distances"].values()) > 0


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    (file,) = folder.glob({"doremi": "doremi", "moe": "dynamic_moe", "combined": "odm"}[kind] + "_weights.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_field_of_the_identity_is_compared_and_has_its_refusal(ranks: Any) -> None:
    identity = ranks[0]["combined"]["identity"]
    refused = {name: text for name, text in REFUSALS.items() if "checkpoint has" in text and "batch of" not in text}
    fields = {text.split("checkpoint has ")[1].split()[0] for text in refused.values()}
    split = set(Split._fields)  # test_elastic.py has them
    assert fields | split == set(identity), "a field needs a row in test_checkpoint.REFUSALS"
    check_identity(identity, dict(identity), Path("there"))
    identity |= {"packing": "rows of 8 tokens"}  # an unpacked run has None there, as an older checkpoint does
    for field in fields:
        for other in (None, "another"):
            with pytest.raises(UserError, match=f"there: the checkpoint has {field} .*, this run has"):
                check_identity(identity, identity | {field: other}, Path("there"))
        with pytest.raises(UserError, match=f"the checkpoint has {field} None, this run has"):
            check_identity({k: v for k, v in identity.items() if k != field}, identity, Path("there"))
