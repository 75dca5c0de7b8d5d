"""The base classes of weighters: they say how much each sample of a batch counts."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from dataflex.forward.counted import Counted
from dataflex.forward.losses import losses_of
from dataflex.ops import shift_labels
from dataflex.utils import dist
from dataflex.utils.errors import UserError, nearest


class Weighter(ABC):
    """Turns the losses of a micro-batch into one loss.

    `get_weighted_loss` returns the scalar loss of this rank's micro-batch; the step's loss is the mean of
    these over micro-batches and ranks. `SampleWeighter` returns weights instead, which is exact for every split
    of the global batch.

    warmup_step: unweighted steps before the first weighted one; the hook sets it. relative: weights compare the
    samples of a global micro-batch with one another, so that with one sample they can have no effect. needs_logits:
    False says that the weighter does not look at the logits of the training forward (by a module's hook, say), so that
    the losses may be made without them (fused_head).
    """

    warmup_step: int = 0
    relative: bool = False
    needs_logits: bool = True

    def __init__(self, **kwargs: Any) -> None:
        if kwargs:
            key, named = next(iter(kwargs)), inspect.signature(type(self)).parameters.values()
            valid = [p.name for p in named if p.kind is not inspect.Parameter.VAR_KEYWORD]
            raise UserError(
                f"{type(self).__name__}: unknown param '{key}'{nearest(key, valid)}; "
                f"valid: {', '.join(valid) or 'none'}"
            )

    def before_step(self, ctx: Any) -> None:  # noqa: B027 (optional to override)
        """Before the first forward of each weighted step, on every rank; may score samples."""

    @abstractmethod
    def get_weighted_loss(
        self, losses: Tensor, *, ctx: Any = None, model: nn.Module | None = None, inputs: Any = None
    ) -> Tensor:
        """Scalar loss with gradient, from ``losses`` float32 [B] of this rank's micro-batch.

        ctx: the `core.context.Run` (``ctx.state.global_step``). inputs: the model's inputs with ``labels``
        [B, T], unshifted; in a run also ``cu_seqlens`` [samples + 1] and ``lengths`` int64 [samples], their tokens.
        """

    def training_step(
        self,
        ctx: Any,
        model: Any,
        inputs: dict[str, Tensor],
        num_items_in_batch: Any = None,
        use_weighter: bool = True,
    ) -> Tensor:
        """Forward, weighting and backward of one micro-batch on a DeepSpeed engine, for loops of one's own.

        ``model``: the engine; ``inputs`` with ``labels`` [B, T] unshifted. Returns the detached loss.
        """
        labels = inputs["labels"]
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        losses = self._per_sample_loss_from_logits(outputs.logits, labels)
        loss = self.get_weighted_loss(losses, ctx=ctx, model=model, inputs=inputs) if use_weighter else losses.mean()
        model.backward(loss)
        return loss.detach()

    def _per_sample_loss_from_logits(self, logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
        """Mean loss of each row's counted tokens, float32 [B]; logits [B, T, V], labels [B, T] unshifted."""
        rows, tokens = labels.shape
        cu_seqlens = torch.arange(rows + 1, device=labels.device) * tokens
        shifted = shift_labels(labels.masked_fill(labels == ignore_index, -100))
        return losses_of(logits, Counted(shifted, cu_seqlens)).loss

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, the same on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (optional to override)
        """Take back what `state_dict` returned."""


def everywhere(values: Tensor, ctx: Any) -> tuple[Tensor, slice]:
    """The values [n] of the samples of the global micro-batch, in the order of ranks, and which are this rank's.

    values: of this rank's samples [B]. ctx: as weighters are given it. Packed, ranks have different numbers of samples.
    """
    if getattr(ctx, "packing", None) is None:
        first, whole = len(values) * dist.rank(), dist.all_gather(values)
    else:
        parts = dist.all_gather_uneven(values)
        first, whole = sum(len(part) for part in parts[: dist.rank()]), torch.cat(parts)
    return whole, slice(first, first + len(values))


class SampleWeighter(Weighter):
    """A weighter that gives each sample a weight: the loss is sum w_i l_i / n over the global batch."""

    @abstractmethod
    def sample_weights(self, losses: Tensor, *, ctx: Any, model: Any, inputs: Any) -> Tensor:
        """Weights float32 [B] >= 0 without gradient.

        Of mean 1 over the global micro-batch they leave the step as large as it was; the loss is divided by the
        samples, whatever the weights sum to. They are not known before the forward, so ``weight_normalization:
        sum_weights`` divides by the samples' own weights only.

        losses: detached float32 [B] of this rank's micro-batch; every rank is called at the same point.
        """

    def get_weighted_loss(
        self, losses: Tensor, *, ctx: Any = None, model: nn.Module | None = None, inputs: Any = None
    ) -> Tensor:
        return (self.sample_weights(losses.detach(), ctx=ctx, model=model, inputs=inputs) * losses).mean()
