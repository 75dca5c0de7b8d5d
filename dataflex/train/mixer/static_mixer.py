"""`static`: the same proportions throughout; `stratified`: those of the domains' sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.plan import check_proportions
from dataflex.core.registry import register_mixer
from dataflex.train.mixer.base_mixer import Mixer
from dataflex.train.mixer.mixture import MixtureManager


@register_mixer("static")
class StaticMixer(Mixer):
    """proportions: one number per domain, normalised; null: the run's initial proportions."""

    def __init__(self, mixture_manager: MixtureManager, proportions: Sequence[float] | None = None) -> None:
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
