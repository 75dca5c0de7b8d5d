"""Components that answer wrongly, and one that dies: a user's own module, named by component_modules."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np

from dataflex.core.registry import register_mixer, register_selector, register_weighter
from dataflex.engine.plugin import DataflexEngine
from dataflex.train.mixer.base_mixer import Mixer
from dataflex.train.selector.base_selector import Selector
from dataflex.train.weighter.base_weighter import SampleWeighter, Weighter


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


def _die_at(name: str, step: int) -> None:
    """Kill the process as if the machine did, where the environment's ``name`` is the step."""
    if step == int(os.environ.get(name, "-1")):
        os.kill(os.getpid(), signal.SIGKILL)


@register_weighter("mortal")
class Mortal(SampleWeighter):
    """Weights by the losses; dies in the step after DIE_AT."""

    def sample_weights(self, losses: Any, *, ctx: Any, model: Any, inputs: Any) -> Any:
        _die_at("DIE_AT", ctx.step)
        return losses / 5


def _save_and_die(self: Any, *args: Any, **named: Any) -> Any:
    """`save_checkpoint`; dies when the checkpoint of DIE_AFTER is whole, before anything else is done."""
    answer = _save(self, *args, **named)
    _die_at("DIE_AFTER", self.run.step)
    return answer


if "DIE_AFTER" in os.environ:
    _save = DataflexEngine.save_checkpoint
    DataflexEngine.save_checkpoint = _save_and_die  # type: ignore[method-assign]
