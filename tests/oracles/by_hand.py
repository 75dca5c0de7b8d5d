"""A training run from scratch: plain torch in float64, sample after sample, without padding, ranks or an engine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RATE, WARMUP, STEPS = 4e-3, 2, 8
DECAY, CLIP, BETAS, EPSILON = 0.1, 0.5, (0.8, 0.95), 1e-6


@dataclass(frozen=True)
class Sample:
    """ids: int64 [T]; the first ``prompt`` of them are not trained on. domain: name of its dataset."""

    ids: Tensor
    prompt: int
    domain: str

    @property
    def trained(self) -> int:
        """Tokens that count: those of the answer."""
        return len(self.ids) - self.prompt


def samples(folder: Path, names: Sequence[str]) -> list[Sample]:
    """The rows of the datasets in order, in the format ``default``: one token a byte, ids from 3 on, 2 ends a turn."""
    tokens = _byte_ids()
    made = []
    for name in names:
        for row in json.loads((folder / "data" / f"{name}.json").read_text()):
            prompt = [*tokens(f"Human: {row['instruction']}"), 2, *tokens("\nAssistant:")]
            answer = [*tokens(row["output"]), 2]
            made.append(Sample(torch.tensor(prompt + answer), len(prompt), name))
    return made


def _byte_ids() -> Callable[[str], list[int]]:
    """Printable ASCII is in the order of its bytes, after '!' at 3; the line end and the space come behind."""
    from tokenizers import pre_tokenizers

    order = {character: place for place, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    shown = {"\n": "\u010a", " ": "\u0120"}
    return lambda text: [3 + order[shown.get(character, character)] for character in text]


def token_losses(model: Any, sample: Sample) -> Tensor:
    """Cross-entropy of each token of the answer, float64 [trained]."""
    logits = model(input_ids=sample.ids[None]).logits[0, sample.prompt - 1 : -1]
    return F.cross_entropy(logits, sample.ids[sample.prompt :], reduction="none")


def evaluation(model: Any, target: Sequence[Sample]) -> dict[str, float]:
    """Token means: of all samples, and of each domain's own."""
    with torch.no_grad():
        losses = [(sample, token_losses(model, sample)) for sample in target]

    def mean(of: str | None) -> float:
        mine = torch.cat([loss for sample, loss in losses if of in (None, sample.domain)])
        return float(mean_of(mine))

    domains = list(dict.fromkeys(sample.domain for sample in target))
    return {"eval_loss": mean(None), **{f"eval_{domain}_loss": mean(domain) for domain in domains}}


def mean_of(losses: Tensor) -> Tensor:
    return losses.sum() / len(losses)


def rate(step: int) -> float:
    """The learning rate after ``step`` steps: up in a line, then down to 0."""
    return RATE * (step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP))


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """AdamW as configured; what has one dimension is a norm's weight and is not decayed."""
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() > 1) == decayed], "weight_decay": DECAY * decayed}
        for decayed in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPSILON)


def norm_of(model: Any) -> float:
    """Of all gradients as one vector."""
    return math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


@dataclass
class Figures:
    """Of each step: loss and norm of the gradient before it is clipped; of each evaluation: its figures by step."""

    losses: list[float]
    norms: list[float]
    evaluations: dict[int, dict[str, float]]
    model: Any


def train(folder: Path, plan: Sequence[Sequence[int]], evaluate_at: Sequence[int]) -> Figures:
    """Token-mean loss of each global batch of ``plan``, clipped gradients, AdamW."""
    pool, target = samples(folder, ("a", "b")), samples(folder, ("near", "far"))
    model = load(folder / "model")
    optimizer = optimizer_of(model)
    figures = Figures([], [], {}, model)
    for step, ids in enumerate(plan):
        if step in evaluate_at:
            figures.evaluations[step] = evaluation(model, target)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss = mean_of(torch.cat([token_losses(model, pool[i]) for i in ids]))
        loss.backward()
        norm = norm_of(model)
        for parameter in model.parameters():
            parameter.grad *= min(1.0, CLIP / norm)
        optimizer.step()
        optimizer.zero_grad()
        figures.losses.append(float(loss.detach()))
        figures.norms.append(norm)
    figures.evaluations[len(plan)] = evaluation(model, target)
    return figures


def train_on_own_loss(folder: Path, plan: Sequence[Sequence[int]], micro_batch: int, lr: float) -> Figures:
    """Plain descent on the mean over micro-batches of the mean squared loss of their samples."""
    pool = samples(folder, ("a", "b"))
    model = load(folder / "model")
    figures = Figures([], [], {}, model)
    for ids in plan:
        parts = [ids[at : at + micro_batch] for at in range(0, len(ids), micro_batch)]
        means = [torch.stack([mean_of(token_losses(model, pool[i])) for i in part]) for part in parts]
        loss = torch.stack([(of_part**2).mean() + of_part.max() for of_part in means]).mean()
        loss.backward()
        figures.losses.append(float(loss.detach()))
        figures.norms.append(norm_of(model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= lr * parameter.grad
                parameter.grad = None
    return figures
