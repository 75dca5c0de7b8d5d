"""dataflex: data-centric training for people who train language models with DeepSpeed.

`initialize` wraps a DeepSpeed engine; importing this package imports neither torch nor deepspeed.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "initialize"]


def initialize(*args: Any, **kwargs: Any) -> Any:
    """A DeepSpeed engine with selection, mixing and weighting: see `dataflex.train.trainer.initialize.initialize`."""
    from dataflex.train.trainer.initialize import initialize as build

    return build(*args, **kwargs)
