"""`odm`: domains as the arms of a bandit whose reward is the training loss (Online Data Mixing, arXiv 2312.02406)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dataflex.core.plan import Floats
from dataflex.core.registry import register_mixer
from dataflex.train.mixer.base_mixer import LearningMixer, check_variant
from dataflex.train.mixer.mixture import Mixture
from dataflex.utils.errors import UserError


def exploration(step: int, domains: int) -> float:
    """The share that every domain keeps: min(1/K, sqrt(ln K / (K t))); 1/K before the first step."""
    if step == 0:
        return 1.0 / domains
    return min(1.0 / domains, float(np.sqrt(np.log(domains) / (domains * step))))


def smoothed_rewards(rewards: Floats, losses: Floats, proportions: Floats, seen: Any, alpha: float) -> Floats:
    """Algorithm 1's moving average of loss / sampling probability [K]; a domain that was not seen keeps its own."""
    scaled = np.divide(losses, proportions, out=np.zeros_like(losses), where=seen)
    return np.where(seen, alpha * rewards + (1 - alpha) * scaled, rewards)


def policy(rewards: Floats, step: int) -> Floats:
    """Algorithm 1's sampling proportions [K] of ``step`` >= 1: (1 - K e_t) softmax(e_{t-1} R) + e_t."""
    k = len(rewards)
    now, before = exploration(step, k), exploration(step - 1, k)
    scaled = before * rewards
    shares = np.exp(scaled - scaled.max())
    return (1 - k * now) * shares / shares.sum() + now


def official_rewards(rewards: Floats, losses: Floats, seen: Any, alpha: float) -> Floats:
    """The authors' moving average of exp(loss) [K], not divided by the proportions; what was not seen keeps its own."""
    with np.errstate(over="ignore"):
        risen = np.minimum(np.exp(losses), np.finfo(np.float64).max / len(losses))
    return np.where(seen, alpha * rewards + (1 - alpha) * risen, rewards)


def official_policy(rewards: Floats, step: int) -> Floats:
    """The authors' proportions [K] after ``step`` >= 1 steps: (1 - K e_t) R / sum R + e_t; some R must be > 0."""
    k = len(rewards)
    now = exploration(step, k)
    return (1 - k * now) * (rewards / rewards.max()) / (rewards / rewards.max()).sum() + now


@register_mixer("odm")
class OdmMixer(LearningMixer):
    """Samples a domain more the larger its loss is; exploration fades with the steps.

    L_d: token-mean loss of domain d in a step's global batch, pi: the proportions it is drawn with, K domains; only
    domains in the batch learn. ``variant: paper`` (algorithm 1), t counting the steps that were learned from::

        R_d    <- alpha R_d + (1 - alpha) L_d / pi_d
        e_t     = min(1/K, sqrt(ln K / (K t)))
        pi_d    = (1 - K e_t) exp(e_(t-1) R_d) / sum_j exp(e_(t-1) R_j) + e_t

    Since e_t goes to 0 while R stays bounded, its proportions go back to equal shares in a long run.
    ``variant: official`` (`SmoothedMeanWeightUpdater.group_update` of the authors' online-data-mixing, the way of its
    README and of its mixed-minibatch runs), t counting all steps, the warm-up's too, in which nothing is learned::

        R_d    <- alpha R_d + (1 - alpha) exp(L_d)
        pi_d    = (1 - K e_t) R_d / sum_j R_j + e_t

    alpha: what the moving average of the rewards keeps at a step (0.9 in both; the authors' runs named 05smoothing
    have 0.5). In the warm-up the initial proportions stay. Both decide at every step (update_step: 1).
    """

    def __init__(self, mixture_manager: Mixture, alpha: float = 0.9, variant: str = "paper") -> None:
        super().__init__(mixture_manager)
        check_variant("odm", variant)
        if not 0 <= alpha < 1:
            raise UserError(f"odm mixer: alpha: expected a number from 0 to below 1, got {alpha}")
        self.alpha, self.variant = float(alpha), variant
        self.learns_in_warmup = variant == "paper"
        self.rewards = np.zeros(len(mixture_manager.names))
        self.steps = 0

    def learn(self, sums: Floats, tokens: Floats) -> None:
        """One more step: rewards from the token-mean losses of the domains that were in it."""
        seen = tokens > 0
        losses = sums / np.maximum(tokens, 1)
        if self.variant == "official":
            self.rewards = official_rewards(self.rewards, losses, seen, self.alpha)
        else:
            self.rewards = smoothed_rewards(self.rewards, losses, self.mixture_manager.proportions, seen, self.alpha)
        self.steps += 1

    def mix(self, model: Any, step_id: int, **kwargs: Any) -> Floats:
        if not self.steps:
            return self.mixture_manager.initial_proportions
        return (
            official_policy(self.rewards, step_id) if self.variant == "official" else policy(self.rewards, self.steps)
        )

    def report(self) -> dict[str, Any]:
        return {"rewards": dict(zip(self.mixture_manager.names, self.rewards.tolist(), strict=True))}

    def state_dict(self) -> dict[str, Any]:
        return {"rewards": self.rewards, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rewards, self.steps = np.asarray(state["rewards"], dtype=np.float64), int(state["steps"])
