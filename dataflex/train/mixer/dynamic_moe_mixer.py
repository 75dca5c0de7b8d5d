"""`dynamic_moe`: more of the domains whose tokens go to other experts than the rest's (arXiv 2406.11256)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dataflex.core.plan import Floats, Ids, generator
from dataflex.core.registry import register_mixer
from dataflex.scoring.passes.router_pass import expert_loads, has_routers
from dataflex.train.mixer.base_mixer import Mixer, check_variant
from dataflex.train.mixer.mixture import Mixture
from dataflex.utils.errors import UserError


def mean_distances(loads: Floats) -> Floats:
    """Mean L2 distance of each domain's expert loads to all domains' [K], itself included (Algorithm 1).

    loads: [K, layers, E], shares of the experts; distances are taken layer by layer and averaged.
    """
    differences = loads[:, None] - loads[None]
    distances: Floats = np.sqrt((differences**2).sum(-1)).mean(axis=(1, 2))
    return distances


def moved_weights(weights: Floats, distances: Floats, eta: float, smoothing: float) -> Floats:
    """softmax(log w + eta * distance), then (1 - c) of it and c of equal weights; [K] to [K]. A weight may be 0."""
    with np.errstate(divide="ignore"):
        logits = np.log(weights) + eta * distances
    shares = np.exp(logits - logits.max())
    return (1 - smoothing) * shares / shares.sum() + smoothing / len(weights)


@register_mixer("dynamic_moe")
class DynamicMoeMixer(Mixer):
    """Looks at the routers of a mixture-of-experts model on a fixed sample of each domain at every decision.

    G_d: shares of the experts among those chosen for domain d's tokens, in each of the M layers that have experts::

        delta_d = 1/K sum_j 1/M sum_m ||G_dm - G_jm||_2
        w'_d    = w_d exp(eta delta_d) / sum_j w_j exp(eta delta_j)
        w_d    <- (1 - c) w'_d + c / K        w begins at (1 - c) x the initial proportions + c / K

    variant: ``official`` looks at the last of these layers only and begins at the initial proportions themselves, as
    the authors' MoE-SFT does (`AdaptiveSamplingCallback` with its defaults l2 and mean, `GateLoadRecordingTrainer`).
    eta, c: step size and smoothing; 10 and 0.05 are the authors'. eval_samples: of each domain, from
    mixer_eval_dataset (one dataset for each training dataset, in the same order or by the same names), else from the
    pool. UserError for a dense model.
    """

    def __init__(
        self,
        mixture_manager: Mixture,
        dataset: Any,
        scorer: Any,
        mixer_eval_dataset: Any = None,
        eta: float = 10.0,
        c: float = 0.05,
        eval_samples: int = 1000,
        seed: int = 42,
        variant: str = "paper",
    ) -> None:
        super().__init__(mixture_manager)
        check_variant("dynamic_moe", variant)
        self.variant = variant
        config = scorer.engine.module.config
        if not has_routers(config):
            raise UserError(
                f"dynamic_moe mixer: a {config.model_type} model has no experts to route to; it needs a "
                "mixture-of-experts model, such as mixtral, qwen3_moe or olmoe"
            )
        if eta <= 0 or not 0 < c <= 1 or eval_samples < 1:
            raise UserError(
                f"dynamic_moe mixer: expected eta > 0, 0 < c <= 1 and eval_samples >= 1, got {eta}, {c}, {eval_samples}"
            )
        self.scorer = scorer
        self.eta, self.c = float(eta), float(c)
        self.pool = dataset if mixer_eval_dataset is None else mixer_eval_dataset
        self.domain_of = domain_order(self.pool.domain_names, mixture_manager.names)
        self.ids = sampled(np.asarray(self.pool.domain_ids), eval_samples, seed)
        self.weights = mixture_manager.initial_proportions
        if variant == "paper":
            self.weights = (1 - self.c) * self.weights + self.c / len(self.weights)
        self.distances = np.zeros_like(self.weights)

    def mix(self, model: Any, step_id: int, **kwargs: Any) -> Floats:
        groups = self.domain_of[np.asarray(self.pool.domain_ids)[self.ids]]
        loads = expert_loads(self.scorer, self.pool, self.ids, groups, len(self.weights))
        self.distances = mean_distances(loads if self.variant == "paper" else loads[:, -1:])
        self.weights = moved_weights(self.weights, self.distances, self.eta, self.c)
        return self.weights

    def report(self) -> dict[str, Any]:
        return {"distances": dict(zip(self.mixture_manager.names, self.distances.tolist(), strict=True))}

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "distances": self.distances}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = np.asarray(state["weights"], dtype=np.float64)
        self.distances = np.asarray(state["distances"], dtype=np.float64)


def domain_order(found: list[str], names: list[str]) -> Ids:
    """For each of the ``found`` domains its number among ``names``: by name where all are the same, else by order."""
    if len(found) != len(names):
        raise UserError(
            f"mixer_eval_dataset: expected one dataset for each of {', '.join(names)}, in this order; "
            f"got {', '.join(found)}"
        )
    same = sorted(found) == sorted(names)
    return np.array([names.index(name) if same else at for at, name in enumerate(found)], dtype=np.int64)


def sampled(domain_ids: Any, most: int, seed: int) -> Ids:
    """Up to ``most`` sample ids of each domain, drawn once, sorted."""
    draw = generator(seed, "dynamic_moe")
    parts = [np.flatnonzero(domain_ids == d) for d in np.unique(domain_ids)]
    return np.sort(np.concatenate([draw.permutation(part)[:most] for part in parts])).astype(np.int64)
