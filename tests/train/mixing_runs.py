"""Runs of learning mixers in `tests.distributed` ranks, with what each step's forward showed, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import dataflex
from dataflex.core.hook import Hook
from dataflex.data.pool import Pool
from dataflex.scoring.kept.store import ShardStore
from dataflex.scoring.kept.token_losses import POOL, write_token_losses
from dataflex.utils import dist
from tests import tiny_engine as tiny
from tests.tiny import tiny_llama

SIZES = {"first": 14, "second": 9, "third": 20}
BATCH, WARMUP, STEPS = 8, 2, 8
GAS = {1: (2,), 2: (1, 2)}
ETA, SMOOTHING, ALPHA = 2.0, 0.01, 0.7
SHARES = [0.5, 0.2, 0.3]


def pool() -> Pool:
    return Pool.from_datasets({name: tiny.samples(size, seed=size) for name, size in SIZES.items()})


def reference_model() -> Any:
    return tiny_llama(tiny.VOCABULARY, initializer_range=0.3, seed=5)


def exact_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Token losses [N] float64; NaN where a token does not count. labels: [N], shifted."""
    counted = labels != -100
    out = torch.full(labels.shape, float("nan"), dtype=torch.float64)
    chosen = torch.log_softmax(logits.double(), dim=-1)[counted].gather(-1, labels[counted, None])
    out[counted] = -chosen[:, 0]
    return out


class Spy(Hook):
    """Keeps for each step every counted token's (sample, domain, loss, reference loss), and what the mixer then has."""

    def __init__(self, engine_of: Any) -> None:
        self.reference = reference_model().double().eval()
        self.engine_of, self.steps, self.tokens = engine_of, [], []

    def on_losses(self, run: Any, micro: Any, losses: Any, outputs: Any) -> None:
        with torch.no_grad():
            other = self.reference(**micro.inputs).logits
        own = exact_losses(outputs.logits.detach().flatten(0, 1), micro.labels)
        reference = exact_losses(other.flatten(0, 1), micro.labels)
        samples = torch.from_numpy(micro.sample_ids).repeat_interleave(micro.cu_seqlens.diff())
        counted = ~own.isnan()
        rows = zip(samples[counted].tolist(), own[counted].tolist(), reference[counted].tolist(), strict=True)
        self.tokens += [[i, int(run.pool.domain_ids[i]), a, b] for i, a, b in rows]

    def on_step_end(self, run: Any, batch: Any) -> None:
        planner = self.engine_of()._loop.planner
        mixer = planner.mixer
        state = mixer.weights if hasattr(mixer, "weights") else mixer.rewards
        self.steps.append(
            {
                "tokens": self.tokens,
                "state": state.tolist(),
                "proportions": planner.manager.proportions.tolist(),
                "loss": run.loss,
                "ids": batch.sample_ids.tolist(),
            }
        )
        self.tokens = []


def train(name: str, params: dict[str, Any], folder: Path, gas: int, **flex: Any) -> list[dict[str, Any]]:
    """A run of STEPS steps; what the spy saw on this rank."""
    if dist.is_main():
        folder.mkdir(parents=True)
        (folder / "components.yaml").write_text(yaml.safe_dump({"mixers": {name: {"params": params}}}))
    dist.barrier()
    engines: list[Any] = []
    spy = Spy(lambda: engines[0])
    engines.append(
        dataflex.initialize(
            model=tiny.model("full"),
            config=tiny.ds_config(3 if gas == 1 else 1, BATCH // (gas * dist.world_size()), gas),
            dataflex={
                "train_type": "dynamic_mix",
                "component_name": name,
                "components_cfg_file": str(folder / "components.yaml"),
                "output_dir": str(folder),
                "init_mixture_proportions": SHARES,
                "warmup_step": WARMUP,
                "train_step": STEPS,
                **flex,
            },
            train_dataset=pool(),
            tokenizer=tiny.PadZero(),
            hooks=[spy],
        )
    )
    for batch in engines[0].batches():
        engines[0].training_step(batch)
    return spy.steps


def make_references(folder: Path) -> None:
    """The reference model as a folder and as a store of its token losses."""
    if dist.is_main():
        reference_model().save_pretrained(folder / "reference")
    dist.barrier()
    engine = dataflex.initialize(
        model=reference_model(),
        config=tiny.ds_config(0),
        dataflex={"train_step": 1},
        train_dataset=pool(),
        tokenizer=tiny.PadZero(),
    )
    write_token_losses(engine.scorer, engine.run.pool, folder / "store", {"weights": "reference"}, 16)


def every_run(folder: str, world: int) -> dict[str, Any]:
    """{run: steps} of doremi with a model and a store, and odm, in both variants, with `GAS` micro-batches a step."""
    where, found = Path(folder), {}
    make_references(where)
    for gas in GAS[world]:
        for kind in ("reference", "store"):
            params = {"reference_model_path": str(where / kind), "reweight_eta": ETA, "reweight_eps": SMOOTHING}
            flex = {"update_step": 3}
            found[f"doremi {kind} {gas}"] = train("doremi", params, where / f"doremi-{kind}-{gas}", gas, **flex)
        official = {"variant": "official", "weight_normalization": "tokens", "update_step": 3}
        name, params = f"doremi official {gas}", {**params, "variant": official.pop("variant")}
        found[name] = train("doremi", params, where / f"doremi-official-{gas}", gas, **official)
        params = {"alpha": ALPHA, "variant": "official"}
        found[f"odm official {gas}"] = train("odm", params, where / f"odm-official-{gas}", gas, update_step=1)
        for update in (1, 3):
            flex = {"update_step": update}
            found[f"odm {update} {gas}"] = train("odm", {"alpha": ALPHA}, where / f"odm-{update}-{gas}", gas, **flex)
    if world == 1:
        found["planted"] = planted_excess(where)
    return found


def planted_excess(folder: Path) -> dict[str, Any]:
    """doremi with a store in which only the second domain's reference losses are below what the model reaches."""
    samples = pool()
    store = ShardStore(folder / "planted", {POOL: samples.fingerprint}, np.arange(len(samples)), len(samples))
    store.resume()
    low = np.where(samples.domain_ids == 1, 0.5, 50.0).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(samples.lengths)]).astype(np.int64)
    store.write(0, {"values": np.repeat(low, samples.lengths), "offsets": offsets})
    params = {"reference_model_path": str(folder / "planted"), "reweight_eta": 0.1, "reweight_eps": 0.001}
    train("doremi", params, folder / "planted-run", 1, update_step=1)
    lines = (folder / "planted-run" / "doremi_weights.jsonl").read_text().splitlines()
    return {
        "lines": [json.loads(line) for line in lines],
        "result": json.loads((folder / "planted-run" / "doremi_average_weights.json").read_text()),
        "decisions": len(list((folder / "planted-run").glob("decisions/*"))),
    }
