"""The one training loop: plans to batches, batches to optimizer steps, with every event of `core.hook`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dataflex.core.clock import DECIDE
from dataflex.core.context import Run
from dataflex.core.hook import Hook, Planner, Weigher
from dataflex.core.plan import Plan, group_by_length
from dataflex.engine.steps.batches import BatchSource, MicroBatch, StepBatch
from dataflex.engine.steps.contributions import micro_loss, step_denominator, token_factors, weighted_tokens
from dataflex.engine.steps.skip import NonFinite, advance_schedule, dropped_by_deepspeed, step_without_update
from dataflex.engine.steps.token_weighing import TokenWeighing
from dataflex.forward.counted import Counted
from dataflex.forward.losses import Forward
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger
from dataflex.utils.standing import after_step


class Stepper:
    """One optimizer step on a DeepSpeed engine, exact for every split of the global batch.

    The loss is the sum of the samples' contributions over the whole window of GAS micro-batches on all ranks,
    divided by one denominator of the same window; so it does not matter who computes which part.
    """

    def __init__(
        self,
        engine: Any,
        run: Run,
        hooks: Sequence[Hook],
        normalization: str,
        class_weight: Tensor | None = None,
        nonfinite: NonFinite | None = None,
        model_forward: Forward | None = None,
    ) -> None:
        """class_weight: float32 [vocabulary] on the device, multiplies the loss of each token by its label's.

        nonfinite: what a loss or gradient that is not finite leads to; without it, to a UserError. model_forward: makes
        the losses, of logits where it is not given.
        """
        self.engine = engine
        self.class_weight = class_weight
        self.nonfinite = nonfinite or NonFinite()
        self._losses = model_forward or Forward()
        self.run = run
        self.loss = math.nan
        self.watchers = [h for h in hooks if type(h).on_losses is not Hook.on_losses]
        self.weighers = [h for h in hooks if isinstance(h, Weigher)]
        self.tokens = TokenWeighing(hooks)
        self.observers = [h for h in hooks if type(h).on_weights is not Hook.on_weights]
        self.normalization = normalization

    def step(self, batch: StepBatch) -> float:
        """Train on one global batch and return its loss, the same on every rank; every module is in train mode.

        A step in which no token or weight counts has loss 0 and moves only the schedule. One whose loss is not finite
        is a UserError naming the samples, or with ``nonfinite: skip`` moves only the schedule too; its loss is NaN.
        """
        self.start(batch)
        self.train_micro_batches(batch)
        return self.loss

    def start(self, batch: StepBatch) -> None:
        """Before the first forward of a global batch: the denominator that its micro-batches share; a collective."""
        self.engine.train()
        denominator = step_denominator(batch, self.normalization).to(torch.float32)
        self._denominator = torch.where(denominator == 0, 1.0, denominator)
        self._total = torch.zeros(2, device=denominator.device)
        self.tokens.start(denominator.device)
        self._seen: list[Tensor] = []

    def train_micro_batches(self, batch: StepBatch) -> None:
        """Forward, backward and step of each micro-batch of a global batch that is started."""
        for micro in batch.micro_batches:
            self.engine.backward(self.forward(micro))
            self.take_step(batch)

    def forward(self, micro: MicroBatch) -> Tensor:
        """The micro-batch's loss for ``engine.backward``, scalar with gradient.

        Its mean over the step's micro-batches on all ranks is the loss of the global batch.
        """
        loss, per_sample, counts = self._micro(micro, self._denominator)
        self._total += torch.stack([loss.detach(), counts.to(loss)])
        self._seen.append(per_sample.detach())
        return loss * (self.run.world_size * self.run.accumulation)

    def take_step(self, batch: StepBatch, *arguments: Any, **named: Any) -> None:
        """DeepSpeed's step after a micro-batch's backward; a collective at the last micro-batch.

        There ``loss`` becomes the global batch's loss, the same on every rank, and the update is left out where there
        is none to make.
        """
        if len(self._seen) < len(batch.micro_batches):
            self.engine.step(*arguments, **named)
            return
        self.loss, counting = self._agree()
        if not counting:
            logger.warning(f"step {self.run.step + 1}: no token or weight counts; nothing but the schedule moves")
            self.loss = 0.0
            step_without_update(self.engine, *arguments, **named)
        elif not math.isfinite(self.loss):
            self.nonfinite.met(self.run, self._culprits(batch, self._seen))
            self.loss = math.nan
            step_without_update(self.engine, *arguments, **named)
        else:
            self.engine.step(*arguments, **named)
            if dropped_by_deepspeed(self.engine):
                self.nonfinite.met(self.run, "the gradient of the global batch is")
                self.loss = math.nan
                advance_schedule(self.engine)
            else:
                self.nonfinite.in_a_row = 0

    def _agree(self) -> tuple[float, float]:
        """The sums over ranks: of their parts of the loss, and of micro-batches in which anything counts.

        Whether the run ends after this step goes with them.
        """
        run = self.run
        vote = torch.full((1,), float(run.stop.vote(run.world_size)), device=self._total.device)
        loss, counting, votes, *of_tokens = dist.all_reduce(torch.cat([self._total, vote, self.tokens.sums])).tolist()
        self.tokens.report(run, *of_tokens)
        if run.step + 1 < run.total_steps:
            run.stop.settle(int(votes), run.world_size)
        return loss, counting

    def _culprits(self, batch: StepBatch, losses: list[Tensor]) -> str:
        """Which losses are not finite, with a verb; a collective."""
        bad = [
            int(i)
            for micro, loss in zip(batch.micro_batches, losses, strict=True)
            for i in micro.sample_ids[~torch.isfinite(loss).cpu().numpy()]
        ]
        mine = [(i, self.run.pool.whence(i) if place < 4 else "") for place, i in enumerate(sorted(bad))]
        everywhere = sorted(found for part in dist.gather_objects(mine) for found in part)
        if not everywhere:
            return "the weighted loss of the global batch is"
        places = ", ".join(place for _, place in everywhere[:4])
        more = f" and {len(everywhere) - 4} more" if len(everywhere) > 4 else ""
        return f"the losses of sample ids {[i for i, _ in everywhere[:16]]} ({places}{more}) are"

    def _micro(self, micro: MicroBatch, denominator: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This micro-batch's part of the step's loss (scalar) and its samples' losses [S], with gradient.

        And whether anything in it counts, bool scalar.
        """
        counted = Counted(
            micro.labels, micro.cu_seqlens, token_weight=micro.token_weights, class_weight=self.class_weight
        )
        rule, late = self.tokens.rule(self.run)
        known = None
        if not self.weighers and not late:
            known = token_factors(micro, micro.weights, self.normalization) / denominator
        losses, outputs, total, numbers = self._losses(self.engine, micro.inputs, counted, factors=known, rule=rule)
        by_token = self.tokens.weights(self.run, micro, numbers)
        for hook in self.watchers:
            hook.on_losses(self.run, micro, losses, outputs)
        answers = [hook.weigh(self.run, micro, losses, outputs) for hook in self.weighers]
        answers = [answer for answer in answers if answer is not None]
        if any(answer.dim() == 0 for answer in answers):
            (loss,) = self._alone(answers, by_token)
            counts = self._counting(micro, None) & (loss.detach() != 0)
            return loss / (self.run.accumulation * self.run.world_size), losses.loss, counts
        weights = micro.weights
        for answer in answers:
            weights = answer if weights is None else weights * answer
        for hook in self.observers:
            hook.on_weights(self.run, micro, weights)
        plain = micro_loss(losses, weights, self.normalization) / denominator
        if by_token is not None:
            self.tokens.note(micro, plain, by_token)
            plain = weighted_tokens(micro, losses, weights, self.normalization, by_token) / denominator
        return (plain if total is None else total), losses.loss, self._counting(micro, weights, by_token)

    def _counting(self, micro: MicroBatch, weights: Tensor | None, by_token: Tensor | None = None) -> Tensor:
        """Whether any token is trained on with a weight other than 0, of it, its class and its sample; bool scalar."""
        tokens = micro.labels != -100
        if micro.token_weights is not None:
            tokens = tokens & (micro.token_weights != 0)
        if self.class_weight is not None:
            tokens = tokens & (self.class_weight[micro.labels.clamp(min=0)] != 0)
        if by_token is not None:
            tokens = tokens & (by_token != 0)
        samples = torch.segment_reduce(tokens.float(), "sum", lengths=micro.cu_seqlens.diff(), unsafe=True) > 0
        return (samples if weights is None else samples & (weights.detach() != 0)).any()

    def _alone(self, answers: list[Tensor], by_token: Tensor | None) -> list[Tensor]:
        """UserError unless there is one answer: a weighter's own loss and another hook's weights do not go together."""
        if len(answers) > 1 or by_token is not None:
            names = ", ".join(hook.identity for hook in (*self.weighers, self.tokens.hook) if hook is not None)
            raise UserError(
                f"step {self.run.step + 1}: one of {names} returns a loss for the whole batch, which leaves no room "
                "for the others' weights; derive it from SampleWeighter"
            )
        return answers


class Loop:
    """Ties planner, batches, stepper and hooks together; see `dataflex.core.hook` for the order of events.

    grouped: reorder every plan so that the samples of a global batch are of about the same length.
    """

    def __init__(
        self, run: Run, hooks: Sequence[Hook], source: BatchSource, stepper: Stepper, grouped: bool = False
    ) -> None:
        planners = [h for h in hooks if isinstance(h, Planner)]
        assert len(planners) == 1, f"a run has one planner, got {len(planners)}"
        self.run = run
        self.hooks = list(hooks)
        self.planner = planners[0]
        self.source = source
        self.stepper = stepper
        self.grouped = grouped
        self.plan: Plan | None = None
        self.planned_phase = -1
        self.inside = False

    def batches(self) -> Iterator[StepBatch]:
        """Follow the plan to the end of the schedule, or to a stop that the ranks have agreed on.

        Call `training_step` with each batch before the next.
        """
        run = self.run
        self._each("on_train_start", run)
        while run.step < run.total_steps:
            phase = run.schedule.phase_at(run.step)
            if self.planned_phase != phase.index:
                self._make_plan()
            assert self.plan is not None
            first = run.step - phase.start
            for offset, batch in enumerate(self.source.batches(self.plan, first, phase.steps), start=first):
                yield batch
                if run.step != phase.start + offset + 1:
                    raise RuntimeError("call engine.training_step(batch) once for each batch of engine.batches()")
                if run.stop.verdict:
                    return
        self._each("on_train_end", run)

    def _make_plan(self) -> None:
        run = self.run
        phase = run.schedule.phase_at(run.step)
        with run.clock.part(DECIDE):
            plan = self.planner.plan(run, phase)
        assert plan.rows == phase.steps * run.global_batch, "the plan does not fit its phase"
        if self.grouped:
            plan = group_by_length(plan, run.pool.lengths, run.global_batch, run.seed, phase.index)
        self.plan, self.planned_phase = plan, phase.index
        for hook in self.hooks:
            hook.on_phase_start(run, phase, plan)

    def training_step(self, batch: StepBatch) -> float:
        """Forward, weighting, backward and optimizer step for one batch; the loss of the global batch."""
        self.begin(batch)
        self.stepper.train_micro_batches(batch)
        return self.end(batch)

    def begin(self, batch: StepBatch) -> None:
        """Before the first forward of a step; UserError inside another."""
        self.between_steps("a new step")
        self.run.figures = {}
        after_step(self.run.step)
        self._each("on_step_start", self.run, batch)
        self.stepper.start(batch)
        self.inside = True

    def end(self, batch: StepBatch) -> float:
        """After the optimizer step: count it and call the hooks; the loss of the global batch."""
        self.inside = False
        self.run.step += 1
        self.run.loss = self.stepper.loss
        self._each("on_step_end", self.run, batch)
        return self.run.loss

    def between_steps(self, what: str) -> None:
        """UserError where a step is begun and not ended."""
        if self.inside:
            raise UserError(
                f"{what} in the middle of step {self.run.step + 1}: first engine.backward and engine.step for each of "
                "its micro-batches"
            )

    def _each(self, event: str, *args: Any) -> None:
        for hook in self.hooks:
            getattr(hook, event)(*args)
