"""dataflex: data-centric training for people who train language models with DeepSpeed.

`initialize` wraps a DeepSpeed engine; importing this package imports neither torch nor deepspeed.
"""

from __future__ import annotations

import os
import sys
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "initialize"]

if sys.argv[:1] == ["-m"] and sys.path[0] == os.getcwd():
    # `python -m dataflex.cli`: Python put the working folder first, where a datasets.py would hide the library.
    sys.path.append(sys.path.pop(0))


def initialize(*args: Any, **kwargs: Any) -> Any:
    """A DeepSpeed engine with selection, mixing and weighting: see `dataflex.train.trainer.initialize.initialize`."""
    from dataflex.train.trainer.initialize import initialize as build

    return build(*args, **kwargs)
