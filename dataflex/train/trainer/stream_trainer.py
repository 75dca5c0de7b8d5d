"""The hook that keeps streams at the place of training, on every rank and over a resume."""

from __future__ import annotations

from typing import Any

from dataflex.core.context import Run
from dataflex.core.hook import Hook
from dataflex.data.streams.stream_pool import StreamPool


class StreamHook(Hook):
    """Brings this rank's streams to the end of each global batch, and checkpoints where they stand."""

    def __init__(self, pool: StreamPool) -> None:
        self.pool = pool

    def on_step_start(self, run: Run, batch: Any) -> None:
        self.pool.reach(batch.sample_ids)

    def state_dict(self) -> dict[str, Any]:
        return self.pool.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pool.load_state_dict(state)
