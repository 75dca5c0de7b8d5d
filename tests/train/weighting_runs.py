"""Weighted runs for test_weighting.py: through the engine in ranks, and from scratch in float64 in one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

import dataflex
from dataflex.core.hook import Hook
from dataflex.data.encoding.collate import Collator
from dataflex.utils import dist
from tests import tiny_engine as tiny

GLOBAL_MICRO, ACCUMULATION, STEPS, WARMUP = 4, 2, 6, 1
BATCH = GLOBAL_MICRO * ACCUMULATION
RATE = 0.25
SIZES = {"short": 9, "long": 15}
REFRESH = 2
LOSS = {"delta": 1.5, "r_start": 2.0, "r_end": 0.25}
ADAPT = {"weight": "softmax", "num_anchors": 3, "refresh_step": REFRESH, "temperature": 0.02, "seed": 4}
TAU = 0.5
WEIGHTERS: dict[str, dict[str, Any]] = {
    "linupper": {"name": "loss", "params": {"strategy": "linupper", **LOSS}},
    "quadratic": {"name": "loss", "params": {"strategy": "quadratic", **LOSS}},
    "extremes": {"name": "loss", "params": {"strategy": "extremes", **LOSS}},
    "uniform": {"name": "loss", "params": {"strategy": "uniform", **LOSS}},
    "mean": {"name": "adapt", "params": {"similarity": "mean", **ADAPT}},
    "max": {"name": "adapt", "params": {"similarity": "max", **ADAPT}},
    "sigmoid": {"name": "adapt", "params": {"refresh_step": REFRESH, "temperature": TAU}},
}
STATIC: dict[str, dict[str, Any]] = {
    "sample": {},
    "domain": {"domain_weights": {"long": 0.25}},
    "class": {"class_weights": {str(i): 0.1 * (i % 7) for i in range(0, tiny.VOCABULARY, 2)}},
    "token": {},
    "every": {"domain_weights": {"short": 2}, "class_weights": {str(i): 3.0 for i in range(3, 99)}},
}


def pools(kind: str = "") -> dict[str, list[dict[str, Any]]]:
    """Two domains; with sample or token weights where ``kind`` asks for them."""
    made: dict[str, list[dict[str, Any]]] = {n: tiny.samples(size, seed=size) for n, size in SIZES.items()}
    for n, sample in enumerate(s for part in made.values() for s in part):
        if kind in ("sample", "every"):
            sample["sample_weight"] = [0.0, 0.25, 1.0, 3.0, 0.5][n % 5]
        if kind in ("token", "every"):
            sample["token_weight"] = [((n + t) % 4) / 2 for t in range(len(sample["input_ids"]))]
    return made


def target() -> list[dict[str, Any]]:
    return tiny.samples(5, seed=77)


class Watch(Hook):
    """Keeps each step's weights by sample id, and its ids."""

    def __init__(self) -> None:
        self.weights: list[dict[int, float]] = []
        self.ids: list[list[int]] = []
        self._now: dict[int, float] = {}

    def on_step_start(self, run: Any, batch: Any) -> None:
        self._now = {}
        self.ids.append(batch.sample_ids.tolist())

    def on_weights(self, run: Any, micro: Any, weights: Any) -> None:
        values = [1.0] * len(micro.sample_ids) if weights is None else weights.tolist()
        self._now |= dict(zip(micro.sample_ids.tolist(), values, strict=True))

    def on_step_end(self, run: Any, batch: Any) -> None:
        self.weights.append({k: v for part in dist.gather_objects(self._now) for k, v in part.items()})


def engine_of(
    folder: Path,
    world: int,
    keys: dict[str, Any],
    *,
    weighter: str | None = None,
    kind: str = "",
    stage: int = 0,
    rate: float = RATE,
    packing: bool = False,
) -> tuple[Any, Watch]:
    folder.mkdir(parents=True, exist_ok=True)
    watch = Watch()
    if weighter is not None:
        components = folder / f"components_{dist.rank()}.yaml"  # a file of its own: the other rank may be reading
        components.write_text(yaml.safe_dump({"weighters": WEIGHTERS}))
        chosen = {"train_type": "dynamic_weight", "component_name": weighter, "warmup_step": WARMUP}
        keys = {**chosen, "components_cfg_file": str(components), **keys}
    engine = dataflex.initialize(
        model=tiny.model("full"),
        config=tiny.ds_config(
            stage,
            micro_batch=GLOBAL_MICRO // world,
            accumulation=ACCUMULATION,
            optimizer={"type": "SGD", "params": {"lr": rate}},
            zero_allow_untested_optimizer=True,
            gradient_clipping=0.0,
        ),
        dataflex={"train_step": STEPS, "output_dir": str(folder), "logging_steps": 2, **keys},
        train_dataset=pools(kind),
        eval_dataset=target(),
        data_collator=Collator(0, packing=packing, cutoff_len=30),
        hooks=[watch],
    )
    return engine, watch


def trained(engine: Any) -> torch.Tensor:
    """All parameters in one vector, float64."""
    from deepspeed.utils import safe_get_full_fp32_param

    full = [safe_get_full_fp32_param(p) for p in engine.module.parameters()]
    values = [p if f is None else f for p, f in zip(engine.module.parameters(), full, strict=True)]
    return torch.cat([v.detach().double().flatten() for v in values])


def train(engine: Any) -> list[float]:
    return [engine.training_step(batch) for batch in engine.batches()]


def trajectories(folder: Path, world: int) -> dict[str, Any]:
    """{weighter: ids, weights and losses of each step}, under ZeRO-3 for the last."""
    found = {}
    for name in WEIGHTERS:
        engine, watch = engine_of(folder / name, world, {}, weighter=name, stage=3 if name == "max" else 0)
        losses = train(engine)
        weights = [[step[i] for i in ids] for step, ids in zip(watch.weights, watch.ids, strict=True)]
        found[name] = {"ids": watch.ids, "weights": weights, "losses": losses}
    return found


def packed_weights(folder: Path, world: int) -> list[list[list[float]]]:
    """Weights of each step of adapt, padded and packed, where the padding lies in a row's last sample."""
    found = []
    for packing in (False, True):
        engine, watch = engine_of(folder / str(packing), world, {"train_step": 3}, weighter="sigmoid", packing=packing)
        train(engine)
        found.append([[step[i] for i in ids] for step, ids in zip(watch.weights, watch.ids, strict=True)])
    return found


def gradients(folder: Path, world: int) -> dict[str, float]:
    """{static kind: relative error of the gradient against sum of w_i grad l_i in float64}."""
    found = {}
    for kind, keys in STATIC.items():
        for packing in (False, True):
            engine, watch = engine_of(
                folder / f"{kind}{packing}", world, {"train_step": 1, **keys}, kind=kind, rate=1024.0, packing=packing
            )
            before = trained(engine)
            train(engine)
            got = (before - trained(engine)) / 1024.0
            want = static_gradient(kind, keys, watch.ids[0])
            found[f"{kind} packing={packing}"] = float((got - want).norm() / want.norm())
    return found


def static_gradient(kind: str, keys: dict[str, Any], ids: list[int]) -> torch.Tensor:
    """Gradient of sum over the batch of w_i d_i / n x mean over counted tokens of t c CE, in float64."""
    net = tiny.model("full").double()
    rows = [(name, sample) for name, part in pools(kind).items() for sample in part]
    classes = torch.ones(tiny.VOCABULARY, dtype=torch.float64)
    for token, weight in keys.get("class_weights", {}).items():
        classes[int(token)] = weight
    total = torch.zeros((), dtype=torch.float64)
    for i in ids:
        name, sample = rows[i]
        losses, labels = token_losses(net, sample)
        counted = labels != -100
        tokens = torch.tensor(sample.get("token_weight", [1.0] * len(sample["labels"])), dtype=torch.float64)[1:]
        weighted = (losses * tokens * classes[labels.clamp(min=0)])[counted].sum() / counted.sum()
        total = total + sample.get("sample_weight", 1.0) * keys.get("domain_weights", {}).get(name, 1.0) * weighted
    return torch.cat([g.flatten() for g in torch.autograd.grad(total / len(ids), list(net.parameters()))])


def token_losses(net: Any, sample: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each next token (0 where it does not count), and its label, [T - 1]."""
    ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])[1:]
    logits = net(input_ids=ids).logits[0, :-1]
    return F.cross_entropy(logits, labels, reduction="none"), labels


def reference(name: str, steps: list[list[int]]) -> tuple[list[list[float]], list[float]]:
    """Weights and losses of each step in float64: the whole run from scratch, with plain SGD."""
    net = tiny.model("full").double()
    rows = [sample for part in pools().values() for sample in part]
    anchors: list[torch.Tensor] = []
    weights, losses = [], []
    for step, ids in enumerate(steps):
        if step >= WARMUP and (step - WARMUP) % REFRESH == 0:
            which = range(len(target())) if name == "sigmoid" else anchor_ids()
            anchors = [state_of(net, target()[i], name) for i in which]
        of_step: list[float] = []
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, BATCH, GLOBAL_MICRO):
            part = [rows[i] for i in ids[start : start + GLOBAL_MICRO]]
            each = []
            for sample in part:
                values, labels = token_losses(net, sample)
                each.append(values.sum() / (labels != -100).sum())
            now = torch.stack(each)
            if step < WARMUP:
                of = [1.0] * len(part)
            elif name in ("mean", "max", "sigmoid"):
                of = adapt_by_hand([state_of(net, s, name) for s in part], anchors, name)
            else:
                progress = (step - WARMUP) / (STEPS - WARMUP)
                r = LOSS["r_start"] + (LOSS["r_end"] - LOSS["r_start"]) * progress
                of = loss_by_hand(now.detach().tolist(), name, LOSS["delta"], r)
            of_step += of
            total = total + (torch.tensor(of, dtype=torch.float64) * now).sum() / BATCH
        gradient = torch.autograd.grad(total, list(net.parameters()))
        with torch.no_grad():
            for parameter, g in zip(net.parameters(), gradient, strict=True):
                parameter -= RATE * g
        weights.append(of_step)
        losses.append(float(total.detach()))
    return weights, losses


def anchor_ids() -> list[int]:
    from dataflex.core.plan import generator

    return sorted(generator(ADAPT["seed"], "adapt anchors").permutation(len(target()))[: ADAPT["num_anchors"]].tolist())


def state_of(net: Any, sample: dict[str, Any], name: str) -> torch.Tensor:
    """Mean of the normed last hidden states where the next token counts; for sigmoid sum_i i h_i / sum_j j."""
    with torch.no_grad():
        hidden = net(input_ids=torch.tensor([sample["input_ids"]]), output_hidden_states=True).hidden_states[-1][0]
    if name == "sigmoid":
        weights = torch.arange(1, len(hidden) + 1, dtype=torch.float64)
        return (hidden * weights[:, None]).sum(0) / weights.sum()
    counted = [t for t in range(len(sample["labels"]) - 1) if sample["labels"][t + 1] != -100]
    return hidden[counted].mean(0)


def adapt_by_hand(states: list[torch.Tensor], anchors: list[torch.Tensor], how: str) -> list[float]:
    scores = []
    for state in states:
        cosines = [float(state @ a / state.norm() / a.norm()) for a in anchors]
        scores.append(max(cosines) if how == "max" else sum(cosines) / len(cosines))
    if how == "sigmoid":
        return [1 / (1 + math.exp(-s / TAU)) for s in scores]
    powers = [math.exp(s / ADAPT["temperature"]) for s in scores]
    return [len(powers) * p / sum(powers) for p in powers]


def loss_by_hand(losses: list[float], strategy: str, delta: float, r: float) -> list[float]:
    low, high = min(losses), max(losses)
    powers = []
    for loss in losses:
        h = delta * (2 * (loss - low) / (high - low) - 1)
        f = {"linupper": min(h + delta, delta), "quadratic": 1 - h**2 / delta**2, "extremes": abs(h), "uniform": 0.0}
        powers.append(math.exp(f[strategy] / r))
    return [len(powers) * p / sum(powers) for p in powers]


def uniform_and_static(folder: Path, world: int) -> list[str]:
    """Parameters after static training, and after uniform weights under the same normalisation."""
    plain, _ = engine_of(folder / "plain", world, {})
    train(plain)
    uniform, _ = engine_of(folder / "same", world, {"weight_normalization": "tokens"}, weighter="uniform")
    train(uniform)
    return [tiny.parameter_hash(plain), tiny.parameter_hash(uniform)]


SAMPLED = {"sampling": "inverse_domain", "sample_weight_as": "both", "sampling_samples": BATCH * 2}


def resumed(folder: Path, world: int, replacement: bool) -> dict[str, Any]:
    """Losses of a run with weighted sampling, of one that goes on in the middle of a pass, and what was drawn."""
    keys = {**SAMPLED, "sampling_replacement": replacement}
    engine, watch = engine_of(folder, world, keys, kind="sample")
    losses = []
    for batch in engine.batches():
        losses.append(engine.training_step(batch))
        if engine.run.step == 3:
            engine.save_checkpoint(folder)
    again, _ = engine_of(folder, world, keys, kind="sample")
    assert again.load_checkpoint(folder)[0] is not None
    tail = train(again)
    same = tiny.parameter_hash(engine) == tiny.parameter_hash(again)
    return {"losses": losses, "tail": tail, "same": same, "ids": watch.ids}


def everything(folder: str, world: int) -> dict[str, Any]:
    """All of it in one process group."""
    place = Path(folder)
    return {
        "trajectories": trajectories(place / "t", world),
        "gradients": gradients(place / "g", world),
        "hashes": uniform_and_static(place / "u", world),
        "resumed": [resumed(place / f"r{r}", world, r) for r in (True, False)],
        "log": (place / "t" / "linupper" / "weights.jsonl").read_text(),
        "packed": packed_weights(place / "p", world),
    }
