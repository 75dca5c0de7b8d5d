"""`run_ranks`, which many tests stand on: a rank that fails or hangs fails the test, with what it printed."""

from __future__ import annotations

import time

import pytest
import torch

from tests.distributed import run_ranks


def add_ranks(more: int) -> int:
    total = torch.tensor(torch.distributed.get_rank() + more)
    torch.distributed.all_reduce(total)
    return int(total)


def refuse() -> None:
    print("about to fail")
    raise ValueError("not this")


def end_early() -> None:
    raise SystemExit(0)


def hang() -> None:
    print("waiting", flush=True)
    time.sleep(600)


def test_ranks_meet_and_bring_back_their_results() -> None:
    assert run_ranks("tests.test_distributed:add_ranks", 2, more=5) == [11, 11]


def test_a_rank_that_fails_is_shown() -> None:
    with pytest.raises(AssertionError, match=r"refuse failed\nrank 0:\nabout to fail\n(.|\n)*ValueError: not this"):
        run_ranks("tests.test_distributed:refuse", 1)


def test_a_rank_that_exits_has_failed() -> None:
    with pytest.raises(AssertionError, match="end_early failed"):
        run_ranks("tests.test_distributed:end_early", 1)


def test_a_rank_that_hangs_is_ended_and_shown() -> None:
    with pytest.raises(AssertionError, match=r"hang hung on 1 ranks\nrank 0:\n(.|\n)*waiting"):
        run_ranks("tests.test_distributed:hang", 1, timeout_s=4)
