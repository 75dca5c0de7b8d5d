"""Weights of tokens (dft, eaft, rho): whole runs against float64 from scratch, with logits and without."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import dataflex
from dataflex.core.hook import Hook, TokenWeigher, Weigher
from dataflex.data.encoding.collate import Collator
from dataflex.engine.steps.token_weighing import TokenWeighing
from dataflex.forward import fused
from dataflex.forward.head import Head
from dataflex.ops.losses.token_rules import TokenRows
from dataflex.train.trainer.token_trainer import TokenWeightHook
from dataflex.train.trainer.training_head import training_head
from dataflex.train.weighter.rho_weighter import RhoWeighter, at_least_kth
from dataflex.train.weighter.token_weighter import TokenWeighter
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.distributed import run_ranks
from tests.tiny import tiny_llama
from tests.train import weighting_runs as runs

PARAMS: dict[str, dict[str, Any]] = {"dft": {}, "eaft": {"alpha": 0.7, "top": 20}, "rho": {"share": 0.35}}
STEPS, WARMUP = 3, 1
# weighter, model, fused_head, ZeRO stage, packing, the samples' own weights
CASES: dict[int, list[tuple[str, str, str, int, bool, str]]] = {
    1: [
        ("dft", "full", "on", 0, False, ""),
        ("eaft", "lora", "on", 2, True, "every"),
        ("eaft", "full", "off", 0, False, ""),
        ("rho", "lora", "on", 0, False, ""),
        ("rho", "full", "off", 1, True, "every"),
    ],
    2: [
        ("dft", "full", "off", 3, True, "every"),
        ("eaft", "full", "on", 3, False, "every"),
        ("rho", "full", "on", 3, True, ""),
    ],
}


class Figures(Hook):
    """What the log is told of each step."""

    def __init__(self) -> None:
        self.steps: list[list[Any]] = []

    def on_step_end(self, run: Any, batch: Any) -> None:
        self.steps.append([batch.sample_ids.tolist(), run.loss, dict(run.figures)])


def reference_model() -> Any:
    return tiny_llama(initializer_range=0.05, seed=1)


def train(case: tuple[str, str, str, int, bool, str], folder: Path, world: int) -> dict[str, Any]:
    name, model, mode, stage, packing, kind = case
    folder.mkdir(parents=True, exist_ok=True)
    components = folder / f"components_{dist.rank()}.yaml"
    components.write_text(yaml.safe_dump({"weighters": {name: {"params": PARAMS[name]}}}))
    figures = Figures()
    engine = dataflex.initialize(
        model=tiny.model(model),
        config=tiny.ds_config(
            stage,
            micro_batch=runs.GLOBAL_MICRO // world,
            accumulation=runs.ACCUMULATION,
            optimizer={"type": "SGD", "params": {"lr": runs.RATE}},
            zero_allow_untested_optimizer=True,
            gradient_clipping=0.0,
        ),
        dataflex={
            "train_step": STEPS,
            "warmup_step": WARMUP,
            "train_type": "dynamic_weight",
            "component_name": name,
            "components_cfg_file": str(components),
            "reference_model_path": str(folder.parent / "reference"),
            "weight_normalization": "mean" if kind else "tokens",
            "fused_head": mode,
            **runs.STATIC.get(kind, {}),
        },
        train_dataset=runs.pools(kind),
        data_collator=Collator(0, packing=packing, cutoff_len=30),
        hooks=[figures],
    )
    runs.train(engine)
    assert (engine._loop.stepper._losses.fused is None) == (mode == "off")
    return {"steps": figures.steps, "after": runs.trained(engine).tolist()}


def every(folder: str, world: int) -> list[Any]:
    fused.CHUNK_TOKENS = {"cpu": 16, "cuda": 16}
    if dist.is_main():
        reference_model().save_pretrained(Path(folder) / "reference")
    dist.barrier()
    return [train(case, Path(folder) / str(n), world) for n, case in enumerate(CASES[world])]


def weights_by_hand(name: str, net: Any, reference: Any, samples: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The weight of each token of a global micro-batch, float64 [T - 1] a sample, 0 where it does not count."""
    found = []
    with torch.no_grad():
        for sample in samples:
            losses, labels = runs.token_losses(net, sample)
            counted = labels != -100
            if name == "dft":
                weights = torch.exp(-losses)
            elif name == "eaft":
                logits = net(input_ids=torch.tensor([sample["input_ids"]])).logits[0, :-1]
                best = torch.sort(logits, descending=True).values[:, : PARAMS["eaft"]["top"]]
                p = torch.exp(best) / torch.exp(best).sum(1, keepdim=True)
                weights = (-(p * torch.log(p)).sum(1) / 3) ** PARAMS["eaft"]["alpha"]
            else:
                weights = losses - runs.token_losses(reference, sample)[0]
            found.append(weights.where(counted, -math.inf if name == "rho" else 0.0))
    if name == "rho":
        excess = torch.cat(found)
        total = int((excess > -math.inf).sum())
        keep = math.ceil(PARAMS["rho"]["share"] * total)
        least = torch.sort(excess, descending=True).values[keep - 1]
        found = [(part >= least).double() * total / keep for part in found]
    return found


def net_of(kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by names that are to go
        return tiny.model(kind)


def by_hand(case: tuple[str, str, str, int, bool, str], steps: list[Any]) -> tuple[list[Any], list[float]]:
    """(loss, plain loss, mean weight) of each step and the parameters at the end, in float64 with plain SGD."""
    name, model, _, _, _, kind = case
    net, reference = net_of(model).double(), reference_model().double()
    rows = [(domain, sample) for domain, part in runs.pools(kind).items() for sample in part]
    keys = runs.STATIC.get(kind, {})
    classes = torch.ones(tiny.VOCABULARY, dtype=torch.float64)
    for token, weight in keys.get("class_weights", {}).items():
        classes[int(token)] = weight
    told = []
    for step, (ids, _, _) in enumerate(steps):
        sums = {key: torch.zeros((), dtype=torch.float64) for key in ("loss", "plain", "weight", "tokens")}
        for start in range(0, len(ids), runs.GLOBAL_MICRO):
            part = [rows[i] for i in ids[start : start + runs.GLOBAL_MICRO]]
            made = weights_by_hand(name, net, reference, [sample for _, sample in part])
            for (domain, sample), weights in zip(part, made, strict=True):
                losses, labels = runs.token_losses(net, sample)
                counted = labels != -100
                own = torch.tensor(sample.get("token_weight", [1.0] * len(sample["labels"])), dtype=torch.float64)[1:]
                losses = losses * own * classes[labels.clamp(min=0)] * counted
                by = sample.get("sample_weight", 1.0) * keys.get("domain_weights", {}).get(domain, 1.0)
                if kind:
                    by = by / float(counted.sum()) / len(ids)
                sums["plain"] += by * losses.sum()
                sums["loss"] += by * (losses * (weights if step >= WARMUP else 1.0)).sum()
                sums["weight"] += weights[counted].sum()
                sums["tokens"] += counted.sum()
        divide = 1.0 if kind else sums["tokens"]
        loss = sums["loss"] / divide
        trained = [p for p in net.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= runs.RATE * gradient
        of_step = (loss, sums["plain"] / divide, sums["weight"] / sums["tokens"])
        told.append([float(value.detach()) for value in of_step])
    return told, torch.cat([p.detach().flatten() for p in net.parameters()]).tolist()


@pytest.mark.parametrize("world", [1, 2])
def test_runs_are_those_of_float64_by_hand(world: int, tmp_path: Path) -> None:
    found = run_ranks("tests.train.test_token_weighters:every", world, folder=str(tmp_path), world=world)[0]
    for case, got in zip(CASES[world], found, strict=True):
        want, after = by_hand(case, got["steps"])
        for step, ((_, loss, figures), (weighted, plain, mean)) in enumerate(zip(got["steps"], want, strict=True)):
            told = {k: v for k, v in figures.items() if k in ("plain_loss", "token_weight_mean")}
            assert loss == pytest.approx(weighted, rel=1e-5), (case, step)
            assert told == (
                {} if step < WARMUP else pytest.approx({"plain_loss": plain, "token_weight_mean": mean}, rel=1e-5)
            )
        assert abs(want[-1][0] - want[-1][1]) > 1e-3, "the case shows nothing"
        start = torch.cat([p.detach().double().flatten() for p in net_of(case[1]).parameters()])
        moved = np.array(after) - start.numpy()
        apart = np.linalg.norm(np.array(got["after"]) - np.array(after)) / np.linalg.norm(moved)
        assert apart < 1e-5, (case, apart)


def test_the_largest_logits_are_found_in_blocks() -> None:
    draw = torch.Generator().manual_seed(3)
    for columns in (7, 64, 1000, 5000):
        logits = torch.randn(5, columns, generator=draw, dtype=torch.float64)
        logits[0, :20] += 9  # all in one block
        logits[1] = logits[1].round()  # with ties
        rows = TokenRows(logits, torch.full((5,), columns - 1), logits.logsumexp(1))
        want = torch.sort(logits, descending=True).values[:, :20]
        assert torch.equal(rows.largest(20), want)
        capped = TokenRows(logits, rows.labels, torch.tanh(logits / 2).mul(2).logsumexp(1), softcap=2.0)
        torch.testing.assert_close(capped.largest(20), 2 * torch.tanh(want / 2))
        loss = torch.nn.functional.cross_entropy(2 * torch.tanh(logits / 2), rows.labels, reduction="none")
        torch.testing.assert_close(capped.losses(), loss)


def test_the_kth_largest_is_exact() -> None:
    draw = np.random.default_rng(5)
    for values in (
        draw.normal(size=300).astype(np.float32),
        np.float32([0.0, -0.0, 1e-42, -1e-42, np.inf, -np.inf, 3e38, -3e38]),
        draw.integers(-2, 3, 100).astype(np.float32),
    ):
        for k in (1, 2, len(values) // 2, len(values)):
            want = values >= np.sort(values)[::-1][k - 1]
            assert np.array_equal(at_least_kth(torch.from_numpy(values), torch.tensor(k)).numpy(), want)


class Twice(TokenWeighter):
    def of_logits(self, rows: TokenRows) -> Any:
        return rows.losses().sum()


class Late(TokenWeigher):
    late = True

    def rule(self, run: Any) -> Any:
        return None


class Scalar(Weigher):
    def weigh(self, run: Any, micro: Any, losses: Any, outputs: Any) -> Any:
        return losses.loss.mean()


def test_what_does_not_fit_is_said(caplog: pytest.LogCaptureFixture) -> None:
    hook = TokenWeightHook(Twice(), "twice", 0)
    rule = hook.rule(SimpleNamespace(step=0))  # type: ignore[arg-type]
    assert rule is not None
    with pytest.raises(UserError, match=r"weighter 'twice': expected numbers \[2\], one per token, got \(\)"):
        rule(TokenRows(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2)))
    with pytest.raises(UserError, match="TokenWeightHook twice and Late both weigh tokens; a run takes one of them"):
        TokenWeighing([hook, Late()])
    with pytest.raises(UserError, match="rho weighter: share: expected a number above 0, up to 1, got 0"):
        RhoWeighter(lambda path: lambda micro: torch.zeros(1), "x", 0)
    with pytest.raises(UserError, match="rho weighter: reference_model_path: missing"):
        RhoWeighter(lambda path: lambda micro: torch.zeros(1))
    assert [hook.compared, TokenWeightHook(RhoWeighter(lambda path: lambda micro: micro, "x"), "rho", 0).compared] == [
        "",
        "global micro-batch",
    ]
    head = fused.FusedHead(Head(torch.nn.Identity(), torch.nn.Linear(4, 9)), always=True)
    with caplog.at_level("INFO", logger="dataflex"):
        training_head(head, [hook], 64)
        assert "its gradient is made together with the losses" in caplog.text
        training_head(head, [Late()], 64)
        assert "Late weighs by the losses, so the backward makes them again in chunks" in caplog.text
