"""Where a run's time goes: seconds by part, over every start of the run that led to the result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TRAIN, SCORE, DECIDE, SAVE, EVALUATE = PARTS = ("train", "score", "decide", "save", "evaluate")


class Clock:
    """Wall time of this process in seconds, by part; what lies in none of them while it runs is ``train``.

    The parts add up to the whole: one inside another stops the outer one's count. scored, tokens: what went through
    scoring passes in the part ``score``, targets included, counted over all ranks.
    """

    def __init__(self) -> None:
        self.scored = self.tokens = 0
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part: str | None = None
        self._since = 0.0

    def start(self) -> None:
        """Count from now on; before that nothing is counted."""
        if self._part is None:
            self._switch(TRAIN)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, time counts as ``name``, one of `PARTS`, if the clock runs."""
        assert name in PARTS
        if self._part is None:
            yield
            return
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def add_scored(self, samples: int, tokens: int = 0) -> None:
        """Count what a scoring pass went over, where a component asked for it."""
        if self._part == SCORE:
            self.scored += samples
            self.tokens += tokens

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds so far of each of `PARTS`."""
        self._switch(self._part)
        return dict(self._seconds)

    @property
    def total(self) -> float:
        """Seconds so far."""
        return sum(self.seconds.values())

    def _switch(self, part: str | None) -> str | None:
        """Go over to ``part``; the part before."""
        before, now = self._part, time.monotonic()
        if before is not None:
            self._seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "scored": self.scored, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what an earlier start had counted."""
        self._switch(self._part)
        self._seconds = dict.fromkeys(PARTS, 0.0) | state["seconds"]
        self.scored, self.tokens = state["scored"], state.get("tokens", 0)
