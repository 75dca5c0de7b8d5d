"""Components that answer wrongly, and one that dies: a user's own module, named by component_modules."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np

from dataflex.core.registry import register_mixer, register_selector, register_weighter
from dataflex.train.mixer.base_mixer import Mixer
from dataflex.train.selector.base_selector import Selector
from dataflex.train.weighter.base_weighter import Weighter


def _selector(name: str, answer: Any) -> None:
    @register_selector(name)
    class Own(Selector):
        def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> Any:
            return answer(num_samples)


def _mixer(name: str, answer: Any) -> None:
    @register_mixer(name)
    class Own(Mixer):
        def mix(self, model: Any, step_id: int, **kwargs: Any) -> Any:
            return answer(len(self.mixture_manager.names))


_selector("out_of_range", lambda n: list(range(1000, 1000 + n)))
_selector("repeats", lambda n: [0] * n)
_selector("too_few", lambda n: [0])
_selector("bug", lambda n: n / 0)
_mixer("nan", lambda k: np.full(k, np.nan))
_mixer("too_many", lambda k: np.ones(k + 1))


@register_weighter("vector")
class Vector(Weighter):
    def get_weighted_loss(self, losses: Any, *, ctx: Any, model: Any, inputs: Any) -> Any:
        return losses


@register_weighter("mortal")
class Mortal(Weighter):
    """The mean, until the step of DIE_AT; then the process is killed as if by the machine."""

    def get_weighted_loss(self, losses: Any, *, ctx: Any, model: Any, inputs: Any) -> Any:
        if ctx.step == int(os.environ.get("DIE_AT", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)
        return losses.mean()
