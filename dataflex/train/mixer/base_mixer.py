"""The base classes of mixers: they say how much of each domain the next phase trains on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dataflex.core.plan import Floats
from dataflex.ops import SampleLoss
from dataflex.train.mixer.mixture import Mixture
from dataflex.utils.errors import UserError, nearest

VARIANTS = ("paper", "official")


def check_variant(mixer: str, variant: str) -> None:
    """UserError unless ``variant`` is one of `VARIANTS`: the paper's formula, or the authors' code where it differs."""
    if variant not in VARIANTS:
        raise UserError(
            f"{mixer} mixer: variant: '{variant}'{nearest(str(variant), VARIANTS)}; valid: {', '.join(VARIANTS)}"
        )


class Mixer(ABC):
    """Decides the proportions of the domains.

    mixture_manager: knows the domains (``names``, and ``sizes`` unless they are streamed) and the present
        ``proportions``.
    """

    def __init__(self, mixture_manager: Mixture) -> None:
        self.mixture_manager = mixture_manager

    @abstractmethod
    def mix(self, model: Any, step_id: int, **kwargs: Any) -> NDArray[np.float64]:
        """Return proportions [domains], non-negative, normalised by the caller; rank 0's answer counts.

        model: the Hugging Face model. step_id: optimizer steps done. kwargs: dataset, data_collator.
        """

    def report(self) -> dict[str, Any]:
        """What the line of a decision in ``<mixer>_weights.jsonl`` says besides the proportions."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, the same on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (optional to override)
        """Take back what `state_dict` returned."""


class LearningMixer(Mixer):
    """A mixer that learns at every optimizer step from the losses of the training forward itself.

    ``learns_in_warmup``: whether also before the first decision.
    """

    learns_in_warmup: bool = True

    def sample_sums(self, micro: Any, losses: SampleLoss) -> Tensor:
        """What is summed by domain: one number per sample of the micro-batch, [S]; by default its loss sum.

        micro, losses: as in `dataflex.core.hook.Hook.on_losses`.
        """
        return losses.loss.detach().double() * losses.count

    @abstractmethod
    def learn(self, sums: Floats, tokens: Floats) -> None:
        """Take in one global batch: `sample_sums` and counted tokens by domain, float64 [K] each.

        They are those of all ranks and micro-batches, the same on every rank.
        """


class WeighingMixer(LearningMixer):
    """A learning mixer that also says how much a sample of each domain counts in the loss.

    ``weighted_mean``: divide the weights by their mean over the counted tokens of the global micro-batch, so that with
    ``weight_normalization: tokens`` a micro-batch's loss is sum_t w_t l_t / sum_t w_t over its tokens.
    """

    weighted_mean: bool = False

    @abstractmethod
    def domain_weights(self) -> Floats:
        """Weights of the domains in the objective, float64 [K], sum 1.

        A sample's loss is multiplied by its domain's weight / the proportion that the domain is sampled with.
        """

    @abstractmethod
    def average_weights(self) -> Floats:
        """The result of the run, float64 [K], sum 1: ``<mixer>_average_weights.json`` holds it."""
