"""Every test starts with the logger and the variables of a process that no launcher has started."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from dataflex.utils.logging import logger

OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Libraries set these where an engine is made or logging is configured in the test's own process."""
    _reset()
    yield
    _reset()


def _reset() -> None:
    logging.disable(logging.NOTSET)
    logger.disabled = False
    logger.setLevel(logging.INFO)
    for name in OF_LAUNCHERS:
        os.environ.pop(name, None)
