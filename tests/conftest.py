"""Every test starts with the logger and the variables of a process that no launcher has started.

The rooms whose modules take longest come first, so that no worker is left alone with one at the end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataflex.utils.logging import logger

OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LONGEST = ("driver", "scoring", "train", "engine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    rooms = {item: item.path.relative_to(here).parts[0] for item in items}
    items.sort(key=lambda item: LONGEST.index(rooms[item]) if rooms[item] in LONGEST else len(LONGEST))


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
