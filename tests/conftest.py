"""Every test starts with the logger and the variables of a process that no launcher has started.

The modules that take longest come first, so that no worker is left alone with one at the end.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from dataflex.utils.logging import logger

# `make test` draws the same cases every time; `make check` draws new ones (--hypothesis-profile drawn).
settings.register_profile("fixed", derandomize=True)
settings.register_profile("drawn", derandomize=False)
settings.load_profile("fixed")

gc.disable()  # what is imported and collected stays: a quarter of that time would go into looking for what does not
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Modules of ten seconds and more, the longest first (`make test` with --durations=80), and then rooms.
LONGEST = (
    "train/test_components",
    "scoring/test_less_on_engines",
    "scoring/test_features",
    "driver/test_score",
    "driver/test_launch",
    "driver/test_stops",
    "driver/test_matrix",
    "test_launcher",
    "driver/test_resumed_scoring",
    "engine/test_checkpoint",
    "engine/test_skipped_steps",
    "train/test_composition",
    "native/test_nvcc",
    "driver/test_bad_input",
    "train/test_mixer_trajectories",
    "scoring/test_sharded",
    "engine/test_deepspeed_contract",
    "engine/test_split",
    "engine/test_mode",
    "forward/test_fused_runs",
    "train/test_weighting",
    "engine/test_elastic",
    "train/test_own_components",
    "native/test_ext",
    "train/test_planted",
    "train/test_cluster_less",
    "native/test_emulation",
    "data/test_cache",
    "driver/test_resumed_files",
    "driver/test_streaming",
    "asked/test_keys",
    "test_initialize",
    "benchmarks/test_downstream",
    "ops/test_project_kinds",
    "test_benchmarks",
    "native/test_build",
    "utils/test_stopping",
    "test_machines",
    *("driver", "scoring", "train", "engine"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here, places = Path(__file__).parent, {name: place for place, name in enumerate(LONGEST)}

    def place(item: pytest.Item) -> int:
        module = item.path.relative_to(here).with_suffix("")
        return places.get(module.as_posix(), places.get(module.parts[0], len(LONGEST)))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


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
