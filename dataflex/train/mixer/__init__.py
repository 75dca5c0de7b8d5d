"""Mixers; importing this package registers those that come with dataflex."""

from dataflex.train.mixer.doremi_mixer import DoremiMixer
from dataflex.train.mixer.dynamic_moe_mixer import DynamicMoeMixer
from dataflex.train.mixer.odm_mixer import OdmMixer
from dataflex.train.mixer.random_mixer import RandomMixer
from dataflex.train.mixer.static_mixer import StaticMixer, StratifiedMixer, TemperatureMixer

__all__ = [
    "DoremiMixer",
    "DynamicMoeMixer",
    "OdmMixer",
    "RandomMixer",
    "StaticMixer",
    "StratifiedMixer",
    "TemperatureMixer",
]
