"""The clock's parts do not overlap, add up to the whole, and go on over a resume."""

from __future__ import annotations

import pytest

from dataflex.core import clock as module
from dataflex.core.clock import DECIDE, EVALUATE, SCORE, TRAIN, Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as its one entry."""
    time = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


def test_a_part_inside_another_stops_the_outer_one(now: list[float]) -> None:
    clock = Clock()
    clock.start()
    now[0] += 1
    with clock.part(DECIDE):
        now[0] += 2
        with clock.part(SCORE):
            now[0] += 4
        now[0] += 8
    now[0] += 16
    assert clock.seconds == {"train": 17, "score": 4, "decide": 10, "save": 0, "evaluate": 0}
    assert clock.total == 31


def test_a_part_that_fails_ends(now: list[float]) -> None:
    clock = Clock()
    clock.start()
    with pytest.raises(KeyError), clock.part(SCORE):
        now[0] += 1
        raise KeyError
    now[0] += 2
    assert (clock.seconds[SCORE], clock.seconds[TRAIN]) == (1, 2)


def test_samples_count_where_a_component_is_asked(now: list[float]) -> None:
    clock = Clock()
    clock.add_scored(1)
    clock.start()
    clock.add_scored(10)
    with clock.part(SCORE):
        clock.add_scored(100)
        with clock.part(EVALUATE):
            clock.add_scored(1000)
    assert clock.scored == 100


def test_a_resumed_clock_goes_on(now: list[float]) -> None:
    first = Clock()
    first.start()
    with first.part(SCORE):
        now[0] += 3
        first.add_scored(7, 70)
    saved = first.state_dict()
    now[0] += 1000
    second = Clock()
    second.load_state_dict(saved)
    now[0] += 1000
    second.start()
    with second.part(SCORE):
        now[0] += 5
        second.add_scored(2, 20)
    assert (second.seconds[SCORE], second.total, second.scored, second.tokens) == (8, 8, 9, 90)


def test_nothing_counts_before_the_start(now: list[float]) -> None:
    clock = Clock()
    with clock.part(DECIDE):
        now[0] += 9
    clock.start()
    assert clock.total == 0
