"""The hook that asks a weighter: unweighted in the warm-up, then at every micro-batch."""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np
import torch

from dataflex.core.clock import SCORE
from dataflex.core.context import Run
from dataflex.core.hook import Hook, Weigher
from dataflex.core.weights import StaticWeights
from dataflex.ops import SampleLoss
from dataflex.ops.known import moved
from dataflex.train.weighter.base_weighter import SampleWeighter, Weighter
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger


class WeightHook(Weigher):
    """Asks ``weighter`` from step ``warmup_step`` on. static: the samples have weights of their own."""

    def __init__(self, weighter: Weighter, name: str, warmup_step: int, static: bool = False) -> None:
        self.weighter = weighter
        self.static = static
        self.name = name
        self.warmup_step = weighter.warmup_step = warmup_step

    def on_train_start(self, run: Run) -> None:
        """UserError where the samples' own weights would be lost in a weighter's one loss."""
        if self.weighter.relative and run.packing is None and run.micro_batch * run.world_size == 1:
            logger.warning(
                f"weighter '{self.name}': the global micro-batch is one sample, so its weight is always 1; raise "
                "per_device_train_batch_size"
            )
        if not isinstance(self.weighter, SampleWeighter) and self.static:
            raise UserError(
                f"weighter '{self.name}': returns one loss for the batch, so the samples' own sample_weight would be "
                "lost; derive it from SampleWeighter, or drop sample_weight"
            )

    def on_step_start(self, run: Run, batch: Any) -> None:
        if run.step >= self.warmup_step:
            with run.clock.part(SCORE):
                self.weighter.before_step(run)

    def weigh(self, run: Run, micro: Any, losses: SampleLoss, outputs: Any) -> torch.Tensor | None:
        if run.step < self.warmup_step:
            return None
        per_sample = losses.loss
        lengths = moved(torch.from_numpy(run.pool.lengths_of(micro.sample_ids)), micro.cu_seqlens.device)
        inputs = {**micro.inputs, "labels": micro.raw_labels, "cu_seqlens": micro.cu_seqlens, "lengths": lengths}
        if isinstance(self.weighter, SampleWeighter):
            weights = self.weighter.sample_weights(per_sample.detach(), ctx=run, model=run.engine.module, inputs=inputs)
            return self._checked(run, weights, per_sample.shape)
        loss = self.weighter.get_weighted_loss(per_sample, ctx=run, model=run.engine.module, inputs=inputs)
        loss = self._checked(run, loss, torch.Size())
        if not loss.requires_grad:
            raise UserError(
                f"weighter '{self.name}' at step {run.step}: expected a scalar loss with gradient, got one without"
            )
        return loss

    def _checked(self, run: Run, answer: Any, shape: torch.Size) -> torch.Tensor:
        """UserError unless the answer is a tensor of ``shape``."""
        if not torch.is_tensor(answer) or answer.shape != shape:
            got = tuple(answer.shape) if torch.is_tensor(answer) else type(answer).__name__
            what = "a scalar loss" if shape == torch.Size() else f"weights {list(shape)}"
            raise UserError(f"weighter '{self.name}' at step {run.step}: expected {what}, got {got}")
        return answer

    @property
    def identity(self) -> str:
        return f"WeightHook {self.name}"

    @property
    def compared(self) -> Literal["", "micro-batch", "global micro-batch"]:
        if self.weighter.relative:
            return "global micro-batch"
        return "" if isinstance(self.weighter, SampleWeighter) else "micro-batch"

    @property
    def needs_logits(self) -> bool:
        return self.weighter.needs_logits

    def state_dict(self) -> dict[str, Any]:
        return self.weighter.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weighter.load_state_dict(state)


def collapsed(count: float, effective: float) -> bool:
    """Whether a step's weights leave so few effective samples that the rest hardly count."""
    return count >= 4 and effective < max(1.5, 0.1 * count)


class WeightLog(Hook):
    """Writes weights.jsonl: a line per ``every`` steps and after the last, about the weights of that step.

    min, mean, max, samples and effective sample size (sum w)^2 / sum w^2 (Kish 1965), over the global batch and per
    domain. Warns once where the effective size collapses. The mean goes into the step's log line as well. identity:
    changes with the samples' own weights.
    """

    def __init__(self, every: int, weights: StaticWeights) -> None:
        self.every = every
        self.weights = weights
        self.warned = False
        self._seen: list[tuple[np.ndarray, torch.Tensor]] = []

    def on_step_start(self, run: Run, batch: Any) -> None:
        self._seen = []

    def on_weights(self, run: Run, micro: Any, weights: torch.Tensor | None) -> None:
        if self._is_due(run.step + 1, run):
            shown = micro.counts.new_ones(len(micro.sample_ids)) if weights is None else weights.detach()
            self._seen.append((run.pool.domains_of(micro.sample_ids), shown.double()))

    def on_step_end(self, run: Run, batch: Any) -> None:
        if not self._is_due(run.step, run):
            return
        device = torch.device(run.engine.device)
        seen = weight_table(on_host(self._seen), len(run.pool.domain_names))
        mine = torch.from_numpy(seen).to(device)
        tables = dist.all_gather(mine[None]).cpu().numpy()
        table = np.column_stack([tables[..., :3].sum(0), tables[..., 3].min(0), tables[..., 4].max(0)])
        whole = summary(np.concatenate([table[:, :3].sum(0), [table[:, 3].min(), table[:, 4].max()]]))
        if whole is None:
            return
        run.figures["weight_mean"] = whole["mean"]
        names = zip(run.pool.domain_names, map(summary, table), strict=True)
        record = {"step": run.step, **whole, "domains": {name: of for name, of in names if of is not None}}
        if run.output_dir is not None and run.is_main:
            with (run.output_dir / "weights.jsonl").open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")
        if collapsed(whole["samples"], whole["effective"]) and not self.warned:
            self.warned = True
            logger.warning(
                f"step {run.step}: the weights have collapsed: {whole['samples']:.0f} samples count like "
                f"{whole['effective']:.1f}; raise the temperature (r_end, temperature) or look at the sample weights"
            )

    def _is_due(self, step: int, run: Run) -> bool:
        return step % self.every == 0 or step == run.total_steps

    @property
    def identity(self) -> str:
        return f"WeightLog {self.weights.identity}"

    def state_dict(self) -> dict[str, Any]:
        return {"warned": self.warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.warned = state["warned"]


def on_host(seen: list[tuple[np.ndarray, torch.Tensor]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(domains, weights) of the micro-batches, their weights by one copy."""
    if not seen:
        return []
    together = torch.cat([weight for _, weight in seen]).cpu().numpy()
    ends = np.cumsum([len(domain) for domain, _ in seen])
    return [(domain, together[end - len(domain) : end]) for (domain, _), end in zip(seen, ends, strict=True)]


def weight_table(seen: list[tuple[np.ndarray, np.ndarray]], domains: int) -> np.ndarray:
    """Per domain: count, sum, sum of squares, min and max of the weights, float64 [domains, 5].

    seen: (domains, weights) of each micro-batch. min and max of a domain without samples are inf and -inf.
    """
    table = np.tile([0.0, 0.0, 0.0, np.inf, -np.inf], (domains, 1))
    count, total, squares, low, high = table.T
    for domain, weight in seen:
        count += np.bincount(domain, minlength=domains)
        total += np.bincount(domain, weight, domains)
        squares += np.bincount(domain, weight**2, domains)
        np.minimum.at(low, domain, weight)
        np.maximum.at(high, domain, weight)
    return table


def summary(row: np.ndarray) -> dict[str, float] | None:
    """What weights.jsonl says of a row of `weight_table`; None without samples."""
    count, total, squares, low, high = (float(value) for value in row)
    if count == 0:
        return None
    effective = total**2 / squares if squares > 0 else 0.0
    return {"samples": count, "min": low, "mean": total / count, "max": high, "effective": effective}
