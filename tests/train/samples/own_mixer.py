"""A user's mixer as the seeds' guide has it: for the package's folder, or named in component_modules."""

import numpy as np

from dataflex.core.registry import register_mixer
from dataflex.utils.logging import logger

from .base_mixer import Mixer


@register_mixer("own_mix")
class OwnMixer(Mixer):
    def __init__(self, mixture_manager, seed):
        super().__init__(mixture_manager)
        self.seed = seed

    def mix(self, model, step_id: int, **kwargs) -> np.ndarray:
        np.random.seed(self.seed)
        raw = np.random.random(len(self.mixture_manager.names))
        probs = raw / raw.sum()
        logger.info(f"[OwnMixer] Step {step_id} Generated proportions: {probs}")
        return probs
