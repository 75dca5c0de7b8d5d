"""Mixers; importing this package registers those that come with dataflex."""

from dataflex.train.mixer.random_mixer import RandomMixer
from dataflex.train.mixer.static_mixer import StaticMixer, StratifiedMixer

__all__ = ["RandomMixer", "StaticMixer", "StratifiedMixer"]
