"""`random`: new random proportions at each decision."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.plan import generator
from dataflex.core.registry import register_mixer
from dataflex.train.mixer.base_mixer import Mixer
from dataflex.train.mixer.mixture import Mixture


@register_mixer("random")
class RandomMixer(Mixer):
    """Uniform from the simplex's corner-normalised cube, seeded by (seed, step). seed: int."""

    def __init__(self, mixture_manager: Mixture, seed: int = 42) -> None:
        super().__init__(mixture_manager)
        self.seed = seed

    def mix(self, model: Any, step_id: int, **kwargs: Any) -> NDArray[np.float64]:
        raw = generator(self.seed, "random_mixer", step_id).random(len(self.mixture_manager.names))
        return raw / raw.sum()
