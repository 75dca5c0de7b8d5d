"""The base class of mixers: they say how much of each domain the next phase trains on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.train.mixer.mixture import MixtureManager


class Mixer(ABC):
    """Decides the proportions of the domains.

    mixture_manager: knows the domains (``names``, ``sizes``) and the present ``proportions``.
    """

    def __init__(self, mixture_manager: MixtureManager) -> None:
        self.mixture_manager = mixture_manager

    @abstractmethod
    def mix(self, model: Any, step_id: int, **kwargs: Any) -> NDArray[np.float64]:
        """Return proportions [domains], non-negative, normalised by the caller; rank 0's answer counts.

        model: the Hugging Face model. step_id: optimizer steps done. kwargs: dataset, data_collator.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, the same on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (optional to override)
        """Take back what `state_dict` returned."""
