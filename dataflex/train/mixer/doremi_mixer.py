"""`doremi`: domain weights from the losses in excess of a reference model's (DoReMi, arXiv 2305.10429)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataflex.core.plan import Floats
from dataflex.core.registry import register_mixer
from dataflex.ops import SampleLoss
from dataflex.train.mixer.base_mixer import WeighingMixer, check_variant
from dataflex.train.mixer.mixture import Mixture
from dataflex.utils.errors import UserError


def updated_weights(weights: Floats, excess: Floats, eta: float, smoothing: float) -> Floats:
    """Algorithm 1's step on the simplex, float64 [K]: exponentiated gradient, then towards equal weights.

    weights: sum 1. excess: token-mean excess losses, >= 0.
    """
    with np.errstate(divide="ignore"):
        logits = np.log(weights) + eta * excess
    moved = np.exp(logits - logits.max())
    return (1 - smoothing) * moved / moved.sum() + smoothing / len(weights)


@register_mixer("doremi")
class DoremiMixer(WeighingMixer):
    """The proxy run of DoReMi: sampling stays as it begins, the loss is weighed, the weights are the result.

    l: loss of a token in the training forward, l_ref: the reference model's, p_d: the proportion that domain d is
    sampled with, K domains. At every step (algorithm 1)::

        excess_d <- mean over d's tokens in the global batch of max(l - l_ref, 0)     d not in it: as it was
        a'_d      = a_d exp(eta excess_d) / sum_j a_j exp(eta excess_j)
        a_d      <- (1 - c) a'_d + c / K                                              a begins at 1 / K
        loss of a sample of d *= a_d / p_d

    reference_model_path: folder of the reference model, or of its stored token losses (`dataflex-cli score`).
    reweight_eta, reweight_eps: eta and c of the paper. variant: ``official`` does what the authors' code does
    (sangmichaelxie/doremi, `DoReMiTrainer`): excess_d of a domain that was not seen yet is the log of the vocabulary's
    size instead of 0, a begins at p instead of 1 / K, and the weights are divided by their mean over the tokens
    (`WeighingMixer.weighted_mean`).
    """

    learns_in_warmup = False

    def __init__(
        self,
        mixture_manager: Mixture,
        scorer: Any,
        open_reference: Callable[[str], Callable[[Any], Tensor]],
        reference_model_path: str | None = None,
        reweight_eta: float = 1.0,
        reweight_eps: float = 1e-3,
        variant: str = "paper",
    ) -> None:
        super().__init__(mixture_manager)
        check_variant("doremi", variant)
        if not reference_model_path:
            raise UserError(
                "doremi mixer: reference_model_path: missing, the folder of the reference model or of its token losses"
            )
        if reweight_eta <= 0:
            raise UserError(f"doremi mixer: reweight_eta: must be > 0, got {reweight_eta}")
        if not 0 <= reweight_eps < 1:
            raise UserError(f"doremi mixer: reweight_eps: expected a number from 0 to below 1, got {reweight_eps}")
        self.eta, self.smoothing = float(reweight_eta), float(reweight_eps)
        domains = len(mixture_manager.names)
        self.weights, self.excess = np.full(domains, 1.0 / domains), np.zeros(domains)
        if variant == "official":
            self.weighted_mean = True
            self.weights = mixture_manager.initial_proportions
            self.excess += np.log(scorer.engine.module.config.vocab_size)
        self.total = np.zeros(domains)
        self.steps = 0
        self._reference = open_reference(reference_model_path)

    def sample_sums(self, micro: Any, losses: SampleLoss) -> Tensor:
        """Excess losses of the samples' tokens, summed, float64 [S]; tokens that do not count are 0 in both."""
        excess = (losses.token_loss.detach() - self._reference(micro)).clamp_(min=0)
        return torch.segment_reduce(excess.double(), "sum", lengths=micro.cu_seqlens.diff(), unsafe=True)

    def learn(self, sums: Floats, tokens: Floats) -> None:
        self.excess = np.where(tokens > 0, sums / np.maximum(tokens, 1), self.excess)
        self.weights = updated_weights(self.weights, self.excess, self.eta, self.smoothing)
        self.total = self.total + self.weights
        self.steps += 1

    def domain_weights(self) -> Floats:
        return self.weights

    def average_weights(self) -> Floats:
        """The mean over the steps so far; the weights it begins with before the first."""
        return self.total / self.steps if self.steps else self.weights

    def mix(self, model: Any, step_id: int, **kwargs: Any) -> Floats:
        return self.mixture_manager.initial_proportions

    def report(self) -> dict[str, Any]:
        """The keys of OpenDCAI/DataFlex's doremi_weights.jsonl."""
        return {
            "domain_names": self.mixture_manager.names,
            "domain_weights": self.weights.tolist(),
            "perdomain_scores": self.excess.tolist(),
            "average_weights": self.average_weights().tolist(),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "excess": self.excess, "total": self.total, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("weights", "excess", "total"):
            setattr(self, name, np.asarray(state[name], dtype=np.float64))
        self.steps = int(state["steps"])
