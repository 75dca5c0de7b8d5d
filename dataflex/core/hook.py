"""Hooks: what may happen around a training step, and when.

The loop (dataflex/engine/steps/loop.py is the only one) in pseudo-code, with every event::

    for hook in hooks: hook.on_train_start(run)
    while run.step < run.total_steps:
        phase = schedule.phase_at(run.step)
        plan = planner.plan(run, phase)              # once per phase: the one hook with `plan`; it may
                                                     # ask a selector or mixer, which may score samples
        for hook in hooks: hook.on_phase_start(run, phase, plan)
        for batch in batches(plan):                  # one global batch: GAS micro-batches on each rank
            for hook in hooks: hook.on_step_start(run, batch)
            for micro in batch.micro_batches:
                outputs = model(micro.inputs)
                losses = per_sample_loss(outputs.logits, micro.labels)  # or without logits: `fused_head`
                for hook in hooks: hook.on_losses(run, micro, losses, outputs)  # look at the training forward
                by_token = hook.rule(run)(logits)      # of a `TokenWeigher`, where there is one, or 1
                weights = micro.weights      # sample_weight x domain weight x 1 / (pool size x q), or 1
                for hook in weighers: weights *= hook.weigh(run, micro, losses, outputs)
                for hook in hooks: hook.on_weights(run, micro, weights)  # look at the product
                engine.backward((weights * losses).sum() / denominator); engine.step()  # of losses times by_token
            run.step += 1
            for hook in hooks: hook.on_step_end(run, batch)         # logging, evaluation, checkpoints
    for hook in hooks: hook.on_train_end(run)

Every event is called on every rank at the same point, so hooks may use collectives. Hooks are called in the
order in which they were added. `state_dict` must be the same on every rank; rank 0's copy is checkpointed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

from dataflex.core.context import Run
from dataflex.core.plan import Phase, Plan


class Hook:
    """Does nothing at every event; subclass and override what you need."""

    @property
    def identity(self) -> str:
        """What a checkpoint must have been made with to be resumed with this hook."""
        return type(self).__name__

    @property
    def compared(self) -> Literal["", "micro-batch", "global micro-batch"]:
        """The group of samples that its weights compare with one another: its size must not change at a resume.

        ``micro-batch``: of one process. ``global micro-batch``: of all processes.
        """
        return ""

    @property
    def needs_logits(self) -> bool:
        """Whether `on_losses` or `weigh` may read ``outputs.logits``; False lets them be left out (fused_head).

        Then whatever is done with ``outputs.logits`` is a UserError.
        """
        return True

    def on_train_start(self, run: Run) -> None:
        """Before the first step, or before the first step after a resume."""

    def on_phase_start(self, run: Run, phase: Phase, plan: Plan) -> None:
        """After the phase's plan is made; not called again for a phase that a resume goes on with."""

    def on_step_start(self, run: Run, batch: Any) -> None:
        """Before the first forward of a step. ``batch`` is a `dataflex.engine.steps.batches.StepBatch`."""

    def on_losses(self, run: Run, micro: Any, losses: Any, outputs: Any) -> None:
        """After a micro-batch's forward, before its weights are asked for and its backward: look, change nothing.

        micro: a `dataflex.engine.steps.batches.MicroBatch`. losses: its `dataflex.ops.SampleLoss`, reduction ``mean``,
        with gradient, but where that of a trained output layer is made with them. outputs: what the model returned.
        """

    def on_weights(self, run: Run, micro: Any, weights: Any) -> None:
        """After the weights are multiplied, before the backward: look, change nothing.

        weights: float [samples of the micro-batch], or None for 1. Not called for a weigher's own scalar loss.
        """

    def on_step_end(self, run: Run, batch: Any) -> None:
        """After the optimizer step; ``run.step`` already counts it and ``run.loss`` is its loss."""

    def on_train_end(self, run: Run) -> None:
        """After the last step of the schedule."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs: numbers, strings, lists, dicts, numpy arrays and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""


class Planner(Hook, ABC):
    """The hook that says which samples a phase trains on; a run has exactly one.

    ``decides``: a plan depends on a decision, so that a resume inside a phase needs the saved one.
    """

    decides: bool = True

    @abstractmethod
    def plan(self, run: Run, phase: Phase) -> Plan:
        """Return ``phase.steps * run.global_batch`` rows in training order, the same on every rank.

        A row is a sample; where ``run.packing`` is set, the samples that share one (`core.packing`).
        """


class Weigher(Hook, ABC):
    """A hook that says how much each sample counts.

    The weights of several are multiplied in the hooks' order (the planner, then the weighter, then further hooks)
    onto the samples' own; weights of classes and tokens are inside the losses already.

    A planner may be one as well: a mixer that reweights the loss.
    """

    @abstractmethod
    def weigh(self, run: Run, micro: Any, losses: Any, outputs: Any) -> Any:
        """Return weights, float [samples of the micro-batch], or the micro-batch's scalar loss, or None.

        micro, losses, outputs: as in `on_losses`. None: unweighted. A scalar loss cannot be combined with the
        weights of another hook.
        """


class TokenWeigher(Hook, ABC):
    """A hook that says how much each token counts, from its logits in the training forward; a run has at most one.

    The weights multiply the tokens' losses in the loss of the step, beside every other weight. Hooks, weighers among
    them, are shown losses without them.

    late: what `rule` makes are no weights yet: `weigh_tokens` makes them when all tokens of the micro-batch are known.
    """

    late: bool = False

    @abstractmethod
    def rule(self, run: Run) -> Any:
        """A `dataflex.ops.losses.token_rules.TokenRule`, whose numbers are the tokens' weights, or None: unweighted."""

    def weigh_tokens(self, run: Run, micro: Any, numbers: Any) -> Any:
        """Weights, float [N], from the numbers [N] of ``late`` rules, which are 0 where a token does not count."""
        return numbers
