"""Packed rows through the engine: whole packs in every step, and each sample's loss, weight and id as it is alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dataflex
from dataflex.config import load_config
from dataflex.core.hook import Hook
from dataflex.data.encoding.collate import Collator
from dataflex.data.pool import Pool
from dataflex.forward.split import split_batch
from dataflex.ops import per_sample_loss
from dataflex.train.trainer.build import packing_of
from dataflex.train.weighter.loss_weighter import loss_weights
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.distributed import run_ranks

GLOBAL_MICRO, ACCUMULATION, CAPACITY = 2, 2, 48
BATCH = GLOBAL_MICRO * ACCUMULATION
SIZES = {"few": 14, "many": 27}


def domains() -> dict[str, list[dict[str, Any]]]:
    return {name: tiny.samples(size, seed=size) for name, size in SIZES.items()}


def samples() -> list[dict[str, Any]]:
    return [sample for part in domains().values() for sample in part]


class Watch(Hook):
    """Of each step: its ids, and by id what the samples' losses and weights were."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_step_start(self, run: Any, batch: Any) -> None:
        self.losses: dict[int, float] = {}
        self.weights: dict[int, float] = {}

    def on_losses(self, run: Any, micro: Any, losses: Any, outputs: Any) -> None:
        self.losses |= dict(zip(micro.sample_ids.tolist(), losses.loss.tolist(), strict=True))

    def on_weights(self, run: Any, micro: Any, weights: Any) -> None:
        if weights is not None:
            self.weights |= dict(zip(micro.sample_ids.tolist(), weights.tolist(), strict=True))

    def on_step_end(self, run: Any, batch: Any) -> None:
        plan = run.engine._loop.plan
        index = run.step - 1 - run.schedule.phase_at(run.step - 1).start
        parts = [plan.part(index * BATCH + k, index * BATCH + k + GLOBAL_MICRO) for k in range(0, BATCH, GLOBAL_MICRO)]
        found: dict[str, Any] = {"ids": batch.sample_ids.tolist(), "loss": run.loss}
        found["micro"] = [ids.tolist() for ids, _ in parts]
        for key, mine in (("losses", self.losses), ("weights", self.weights)):
            found[key] = {str(i): value for part in dist.gather_objects(mine) for i, value in part.items()}
        self.steps.append(found)


def build(folder: Path | None = None, micro: int = GLOBAL_MICRO, **keys: Any) -> tuple[Any, Watch]:
    """micro: packs of a micro-batch on all ranks together; the packs of a step stay."""
    watch, data = Watch(), domains()
    for part in data.values():
        for n, sample in enumerate(part):
            sample["sample_weight"] = 1.0 + n % 3
    engine = dataflex.initialize(
        model=tiny.model("full", num_hidden_layers=1),
        config=tiny.ds_config(2, micro_batch=micro // dist.world_size(), accumulation=BATCH // micro),
        dataflex={"packing": True, "cutoff_len": CAPACITY, "output_dir": str(folder) if folder else None, **keys},
        train_dataset=data,
        tokenizer=tiny.PadZero(),
        hooks=[watch],
    )
    return engine, watch


def train(engine: Any, until: int = -1) -> str:
    for batch in engine.batches():
        engine.training_step(batch)
        if engine.run.step == until:
            break
    return tiny.parameter_hash(engine)


DECIDES = {"warmup_step": 1, "update_step": 2, "train_step": 6, "seed": 5}
RUNS: dict[str, dict[str, Any]] = {
    "static": {"num_train_epochs": 2},
    "weigher": {"train_type": "dynamic_weight", "component_name": "loss", "train_step": 3},
    "select": {"train_type": "dynamic_select", "component_name": "loss", "update_times": 2, **DECIDES},
    "mix": {
        "train_type": "dynamic_mix",
        "component_name": "temperature",
        "init_mixture_proportions": [0.5, 0.5],
        **DECIDES,
    },
    "both": {
        "train_type": ["dynamic_select", "dynamic_mix"],
        "component_name": {"select": "random", "mix": "odm"},
        **DECIDES,
    },
    "weighted": {"sampling": "inverse_domain", "num_train_epochs": 1, "sampling_correction": True},
}


def every_run(folder: str) -> dict[str, Any]:
    """{run: its steps, schedule and end}, and a run that is stopped inside a phase and goes on."""
    found: dict[str, Any] = {}
    for name, keys in RUNS.items():
        engine, watch = build(Path(folder) / name, **keys)
        phases = [[phase.start, phase.steps] for phase in engine.run.schedule.phases]
        end = train(engine)
        found[name] = {"steps": watch.steps, "phases": phases, "end": end, "packs": engine.run.packing.pool.rows}
    found["trial"] = engine.trial_step()
    place = Path(folder) / "again"
    first, before = build(place, **RUNS["both"])
    train(first, 4)
    first.save_checkpoint()
    second, after = build(place, **RUNS["both"])
    second.load_checkpoint()
    end = train(second)
    return found | {"again": {"steps": [*before.steps, *after.steps], "end": end}}


def elsewhere(folder: str, saved: str) -> dict[str, Any]:
    """The steps of runs that go on with another number of ranks' checkpoint, by the packs of their micro-batches."""
    found: dict[str, Any] = {}
    for micro in (GLOBAL_MICRO, BATCH):
        engine, watch = build(Path(folder) / str(micro), micro, **RUNS["both"])
        engine.load_checkpoint(saved)
        train(engine)
        found[str(micro)] = watch.steps
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, dict[str, Any]]]:
    found = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        found[world] = folder, run_ranks("tests.engine.test_packs:every_run", world, folder=str(folder))[0]
    return found


def losses_alone() -> np.ndarray:
    """The mean loss of each sample in the fresh model, in a batch of its own, float64 [pool]."""
    net, found = tiny.model("full", num_hidden_layers=1).eval(), []
    for sample in samples():
        inputs, labels, _, cu_seqlens = split_batch(Collator(0)([sample]), torch.device("cpu"))
        with torch.no_grad():
            found.append(float(per_sample_loss(net(**inputs).logits.flatten(0, 1), labels, cu_seqlens).loss))
    return np.array(found)


def test_the_first_steps_losses_are_those_of_the_samples_alone(runs: Any) -> None:
    step = runs[2][1]["static"]["steps"][0]
    alone = losses_alone()
    assert len(step["losses"]) == len(step["ids"]) > BATCH
    for key, loss in step["losses"].items():
        assert loss == pytest.approx(alone[int(key)], rel=1e-5)
    weights = {i: 1.0 + (i if i < SIZES["few"] else i - SIZES["few"]) % 3 for i in step["ids"]}
    assert {int(key): weight for key, weight in step["weights"].items()} == weights
    mean = sum(weights[i] * alone[i] for i in step["ids"]) / len(step["ids"])
    assert step["loss"] == pytest.approx(mean, rel=1e-5), "the denominator is the samples of the step's packs"


def test_a_pass_is_its_packs(runs: Any) -> None:
    found = runs[1][1]["static"]
    assert sum(len(sample["input_ids"]) for sample in samples()) == 613
    assert found["packs"] == 14, "13 rows of 48 would hold as many tokens, if samples could be cut"
    assert found["phases"] == [[0, 4], [4, 4]], "a pass of 14 packs in steps of 4 is 4 steps"
    assert runs[1][1]["trial"] > 0
    ids = [i for step in found["steps"][:7] for i in step["ids"]]
    assert np.bincount(ids, minlength=41).tolist() == [2] * 41, "every sample twice in 28 packs, before any comes again"


@pytest.mark.parametrize("name", RUNS)
def test_ranks_change_nothing(runs: Any, name: str) -> None:
    one, two = runs[1][1][name]["steps"], runs[2][1][name]["steps"]
    assert [step["ids"] for step in one] == [step["ids"] for step in two]
    assert [step["loss"] for step in one] == pytest.approx([step["loss"] for step in two], rel=1e-5)
    for a, b in zip(one, two, strict=True):
        assert a["losses"].keys() == b["losses"].keys() == {str(i) for i in a["ids"]}
        assert a["weights"] == pytest.approx(b["weights"], rel=1e-4)


@pytest.mark.parametrize("world", [1, 2])
def test_a_resume_inside_a_phase_goes_on_bit_for_bit(runs: Any, world: int) -> None:
    whole, again = runs[world][1]["both"], runs[world][1]["again"]
    assert again == {"steps": whole["steps"], "end": whole["end"]}


@pytest.mark.parametrize(("saved_by", "ranks"), [(1, 2), (2, 1)])
def test_a_resume_on_another_number_of_ranks_has_the_same_packs(
    saved_by: int, ranks: int, runs: Any, tmp_path: Path
) -> None:
    """Inside the phase from step 3 to 5, with the losses of the same samples, in micro-batches of other sizes too."""
    folder, whole = runs[saved_by][0], runs[saved_by][1]["both"]["steps"][4:]
    target = "tests.engine.test_packs:elsewhere"
    for steps in run_ranks(target, ranks, folder=str(tmp_path), saved=str(folder / "again"))[0].values():
        assert [step["ids"] for step in steps] == [step["ids"] for step in whole] and len(steps) == 2
        for got, want in zip(steps, whole, strict=True):
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
            assert got["losses"] == pytest.approx(want["losses"], rel=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_every_row_of_a_step_is_a_pack(runs: Any, name: str) -> None:
    lengths = np.array([len(sample["input_ids"]) for sample in samples()])
    for step in runs[2][1][name]["steps"]:
        assert [i for part in step["micro"] for i in part] == step["ids"]
        assert all(0.3 < lengths[part].sum() / (GLOBAL_MICRO * CAPACITY) <= 1 for part in step["micro"])
    filled = [lengths[step["ids"]].sum() / (BATCH * CAPACITY) for step in runs[2][1][name]["steps"]]
    assert np.mean(filled) > 0.85


def test_a_weighter_compares_the_samples_of_the_packs_of_all_ranks(runs: Any) -> None:
    step = runs[2][1]["weigher"]["steps"][0]
    assert {len(part) for part in step["micro"]} != {GLOBAL_MICRO}
    for part in step["micro"]:
        losses = torch.tensor([step["losses"][str(i)] for i in part])
        own = torch.tensor([1.0 + (i if i < SIZES["few"] else i - SIZES["few"]) % 3 for i in part])
        want = loss_weights(losses, strategy="linupper", delta=1.0, r=2.0) * own
        assert [step["weights"][str(i)] for i in part] == pytest.approx(want.tolist(), rel=1e-5)


def test_a_decision_fills_its_phase(runs: Any) -> None:
    folder, found = runs[1]
    steps, picked = found["select"]["steps"], {}
    assert found["select"]["phases"] == [[0, 1], [1, 2], [3, 2], [5, 1]]
    for at in (1, 3):
        record = json.loads((folder / "select/decisions" / f"step_{at}.json").read_text())
        picked[at] = record["indices"]
        assert len(record["indices"]) == len(record["metric"]["loss"]) > 2 * BATCH
        trained = [i for step in steps[at : at + 2] for i in step["ids"]]
        assert sorted(trained) == sorted(record["indices"]), "all that was picked was trained, and nothing else"
    assert set(steps[5]["ids"]) <= set(picked[3]), "what is left of the run goes on with the last picks, pack by pack"


def test_mixing_counts_hold_in_a_phase_and_the_deviation_is_said(runs: Any) -> None:
    folder, found = runs[1]
    lines = [json.loads(line) for line in (folder / "mix/temperature_weights.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 3, 5, 6]
    given = np.zeros(2)
    for line, steps in zip(lines, (slice(0, 1), slice(1, 3), slice(3, 5), slice(5, 6)), strict=False):
        ids = np.array([i for step in found["mix"]["steps"][steps] for i in step["ids"]])
        counts = np.bincount(ids >= SIZES["few"], minlength=2)
        wanted = np.array(list(line["weights"].values())) * len(ids)
        assert np.abs(counts - wanted).max() < 1, "largest remainders of the samples that fill the packs"
        packs = line["packs"]
        assert (packs["rows"], packs["samples"]) == (len(found["mix"]["steps"][steps]) * BATCH, len(ids))
        assert packs["deviation"] == pytest.approx(np.abs(counts - wanted).max() / len(ids), abs=1e-6)
        assert list(line["samples"].values()) == given.tolist()
        given += counts
    assert list(lines[-1]["samples"].values()) == given.tolist()


def test_a_mixers_counts_are_those_of_the_selectors_picks(runs: Any) -> None:
    folder, found = runs[1]
    record = json.loads((folder / "both/decisions/step_3.json").read_text())
    counts = np.bincount(np.array(record["indices"]) >= SIZES["few"], minlength=2)
    wanted = np.array(list(record["proportions"].values())) * len(record["indices"])
    assert np.abs(counts - wanted).max() < 1
    trained = [i for step in found["both"]["steps"][3:5] for i in step["ids"]]
    assert sorted(trained) == sorted(record["indices"])


def test_a_sample_that_does_not_fit_a_row_is_named() -> None:
    cfg = load_config({"packing": True, "cutoff_len": 16}, embedded=True, quiet=True)
    data = [{"input_ids": [1] * n, "labels": [1] * n} for n in (16, 2, 9, 17)]
    with pytest.raises(UserError, match=r"packing: sample 3 \('train' at 3\) has 17 tokens, a row holds cutoff_len 16"):
        packing_of(cfg, Pool.from_datasets(data))
