"""The loop with forward, backward and step as the user's own calls, one micro-batch at a time.

It gives what `Loop.training_step` gives, bit for bit, since both call the same parts of `Stepper` in the same order.
What would go past the plan, the weights and the hooks is refused before its backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dataflex.engine.steps.batches import MicroBatch, StepBatch
from dataflex.engine.steps.loop import Loop
from dataflex.utils.errors import UserError

LOOP = "for micro in engine.micro_batches(): loss = engine(micro); engine.backward(loss); engine.step()"


class MicroLoop:
    """Where the user's loop stands between the calls for a micro-batch."""

    def __init__(self, engine: Any, loop: Loop) -> None:
        """engine: DeepSpeed's."""
        self.engine, self.loop = engine, loop
        self._batch: StepBatch | None = None
        self._left: list[MicroBatch] = []
        self._loss: Tensor | None = None
        self._went_back = False
        self._going_back = False

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Follow the plan to the end of the schedule, one forward's worth of samples at a time."""
        for batch in self.loop.batches():
            self.loop.begin(batch)
            self._batch, self._left = batch, list(batch.micro_batches)
            for micro in batch.micro_batches:
                yield micro
                if self._left and self._left[0] is micro:
                    raise UserError(f"a micro-batch was not trained on: write {LOOP}")

    def forward(self, micro: MicroBatch) -> Tensor:
        """The micro-batch's loss with its weights, scalar with gradient; see `Stepper.forward`."""
        if not self._left or micro is not self._left[0] or self._loss is not None:
            raise UserError(f"engine(micro): not the micro-batch at hand, or its loss was asked for before: {LOOP}")
        if not torch.is_grad_enabled():
            raise UserError(
                "engine(micro): inside torch.no_grad, where no loss can be trained on: call it outside; to see what "
                "the model returns, call engine(**inputs) with inputs of your own"
            )
        self._loss, self._went_back = self.loop.stepper.forward(micro), False
        self._loss.register_hook(self._saw_backward)
        return self._loss

    def plain_forward(self, *inputs: Any, **named: Any) -> Any:
        """What the model returns for inputs of the user's own; no backward may start from it alone."""
        if inputs and isinstance(inputs[0], StepBatch):
            raise UserError(
                "engine(batch): a batch of engine.batches() is all micro-batches of a step: pass it to "
                f"engine.training_step, or write {LOOP}"
            )
        outputs = self.engine(*inputs, **named)
        for tensor in _tensors(outputs):
            if tensor.requires_grad:
                tensor.register_hook(self._refuse_backward)
        return outputs

    def backward(self, loss: Any, *, scale_wrt_gas: bool = True, **how: Any) -> Any:
        """DeepSpeed's backward from the loss of the micro-batch at hand, or from what the user made of it."""
        if self._loss is None or not torch.is_tensor(loss) or not _comes_from(loss, self._loss):
            raise UserError(_foreign("engine.backward"))
        if self._went_back:
            raise UserError(f"engine.backward: this micro-batch had its backward: {LOOP}")
        if not scale_wrt_gas:
            raise UserError(
                "engine.backward: scale_wrt_gas=False is not supported: the loss of a micro-batch is scaled for the "
                "whole step already"
            )
        self._going_back = True
        try:
            return self.engine.backward(loss, **how)
        finally:
            self._going_back = False

    def step(self, *arguments: Any, **named: Any) -> None:
        """DeepSpeed's step; after the last micro-batch the step is counted and the hooks are called."""
        if self._loss is None or not self._went_back:
            raise UserError(f"engine.step: no backward of a micro-batch came before: {LOOP}")
        assert self._batch is not None
        self.loop.stepper.take_step(self._batch, *arguments, **named)
        self._loss = None
        self._left.pop(0)
        if not self._left:
            batch, self._batch = self._batch, None
            self.loop.end(batch)

    def _saw_backward(self, _gradient: Tensor) -> None:
        self._went_back = True

    def _refuse_backward(self, _gradient: Tensor) -> None:
        if not self._going_back:
            raise UserError(_foreign("backward"))


def _foreign(what: str) -> str:
    return (
        f"{what}: this loss does not come from a micro-batch of dataflex's plan, so selection, weights and hooks would "
        f"be left out: {LOOP}"
    )


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """The tensors in what a model returned."""
    if torch.is_tensor(outputs):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, list | tuple):
        for value in outputs:
            yield from _tensors(value)


def _comes_from(loss: Tensor, origin: Tensor) -> bool:
    """Whether the graph of ``loss`` goes through ``origin``."""
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is origin.grad_fn:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return False
