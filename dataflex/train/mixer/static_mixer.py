"""`static`: the same proportions throughout; `stratified`, `temperature`: from the domains' sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.plan import check_proportions
from dataflex.core.registry import register_mixer
from dataflex.train.mixer.base_mixer import Mixer
from dataflex.train.mixer.mixture import Mixture
from dataflex.utils.errors import UserError


@register_mixer("static")
class StaticMixer(Mixer):
    """proportions: one number per domain, normalised; null: the run's initial proportions."""

    def __init__(self, mixture_manager: Mixture, proportions: Sequence[float] | None = None) -> None:
        super().__init__(mixture_manager)
        self.proportions = (
            mixture_manager.initial_proportions
            if proportions is None
            else check_proportions(proportions, names=mixture_manager.names, source="static mixer: proportions")
        )

    def mix(self, model: Any, step_id: int, **kwargs: Any) -> NDArray[np.float64]:
        return self.proportions


@register_mixer("stratified")
class StratifiedMixer(Mixer):
    """Each domain by its size: the baseline that every mixer must be compared with."""

    def mix(self, model: Any, step_id: int, **kwargs: Any) -> NDArray[np.float64]:
        sizes = self.mixture_manager.sizes.astype(np.float64)
        return sizes / sizes.sum()


@register_mixer("temperature")
class TemperatureMixer(Mixer):
    """Proportional to size ** tau: 1 is `stratified`, 0 is equal shares; small domains come more often than by size."""

    def __init__(self, mixture_manager: Mixture, tau: float = 0.5) -> None:
        super().__init__(mixture_manager)
        if not 0 <= tau < np.inf:
            raise UserError(f"temperature mixer: tau: expected a number >= 0, got {tau}")
        self.tau = float(tau)

    def mix(self, model: Any, step_id: int, **kwargs: Any) -> NDArray[np.float64]:
        sizes = self.mixture_manager.sizes.astype(np.float64)
        shares = np.where(sizes > 0, (sizes / sizes.max()) ** self.tau, 0.0)
        return shares / shares.sum()
