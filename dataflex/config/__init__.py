"""Typed configuration: `load_config` turns a YAML file and key=value overrides into a frozen `Config`."""

from dataflex.config.load import load_config
from dataflex.config.schema import Config

__all__ = ["Config", "load_config"]
