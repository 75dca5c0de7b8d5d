"""The watch over the ranks: in one process over torch's in-memory store, and with ranks that stop, hang and fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as torch_dist

from dataflex.utils import beats, dist, standing, watchdog
from dataflex.utils.beats import Watch
from dataflex.utils.errors import UserError
from dataflex.utils.standing import Standing, main_thread
from dataflex.utils.stopping import Stopped
from tests.distributed import run_ranks
from tests.test_launcher import LAUNCH, LINUX, ROOT

WAIT = Standing("_agree (dataflex/engine/steps/loop.py:241)", "all_reduce", 3, 1)
HANG = Standing("select (mine.py:7)", "", 3, 2)
TIMEOUT_S, BEAT_S = 600.0, 5.0


class Ranks:
    """Watches that beat one after the other; ``at`` says where each rank is, and None that it is stopped."""

    def __init__(self, *at: Standing | None, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at = list(at)
        self.moves = 100
        self.ticks = dict.fromkeys(range(len(at)), 0)
        monkeypatch.setattr(beats.socket, "gethostname", lambda: "node1")
        monkeypatch.setattr(beats.os, "getpid", iter(range(len(at))).__next__)
        monkeypatch.setattr(beats, "_cpu_ticks", self.ticks.__getitem__)
        monkeypatch.setattr(beats, "_stat", lambda pid: ["T" if self.at[pid] is None else "S"])
        store = torch_dist.HashStore()
        looks = [lambda rank=rank: self.at[rank] for rank in range(len(at))]
        self.watches = [Watch(store, rank, len(at), TIMEOUT_S, BEAT_S, look) for rank, look in enumerate(looks)]

    def beat(self, seconds: float) -> list[str]:
        """What each rank found that the run is to end for in so many seconds."""
        said: list[str] = []
        for _ in range(int(seconds / BEAT_S)):
            said += [text for rank, watch in enumerate(self.watches) if self.at[rank] and (text := watch.round())]
        return said

    def work(self, rank: int, seconds: float) -> list[str]:
        """`beat` while the main thread of ``rank`` moves."""
        said: list[str] = []
        for _ in range(int(seconds / BEAT_S)):
            self.moves += 1
            at = self.at[rank]
            assert at is not None
            self.at[rank] = at._replace(stack=self.moves)
            said += self.beat(BEAT_S)
        return said


def test_a_stopped_rank_is_named_with_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(WAIT, HANG, WAIT, monkeypatch=monkeypatch)
    assert ranks.beat(60) == []
    ranks.at[1] = None
    assert ranks.beat(295) == []
    assert ranks.beat(2 * BEAT_S)[0] == (
        "rank 1 (process 1 on node1) has been silent for 300 s (it is stopped): it was last at select (mine.py:7) "
        "after step 3, and the other ranks cannot go on without it"
    )
    assert [beat.rank for beat in ranks.watches[0].silent()] == [1]


def test_the_others_see_that_rank_0_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the store is not in its process."""
    ranks = Ranks(HANG, WAIT, WAIT, monkeypatch=monkeypatch)
    ranks.beat(10)
    ranks.at[0] = None
    said = ranks.beat(305)
    assert said and all(text.startswith("rank 0 (process 0 on node1) has been silent for 300 s") for text in said)


def test_a_process_that_uses_its_processor_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread holds the interpreter's lock, so that no other thread of it beats."""
    ranks = Ranks(WAIT, HANG, monkeypatch=monkeypatch)
    ranks.beat(60)
    ranks.at[1] = None
    for _ in range(100):
        ranks.ticks[1] += 1
        assert ranks.beat(BEAT_S) == []
    assert ranks.beat(300) != []


def test_a_rank_that_has_ended_needs_no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(WAIT, HANG, monkeypatch=monkeypatch)
    ranks.beat(60)
    ranks.watches[1].end()
    ranks.at[1] = None
    assert ranks.beat(2 * TIMEOUT_S) == []


def test_a_hung_rank_is_named_after_ddp_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(WAIT, WAIT, HANG, monkeypatch=monkeypatch)
    assert ranks.beat(TIMEOUT_S) == []
    assert ranks.beat(2 * BEAT_S)[0] == (
        "no step has ended for 600 s (ddp_timeout): rank 2 (process 2 on node1) is at select (mine.py:7) after step 3; "
        "ranks 0, 1 are waiting in all_reduce, at _agree (dataflex/engine/steps/loop.py:241) after step 3"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_loops_is_found_by_those_that_wait(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(*([HANG, WAIT] if rank == 0 else [WAIT, HANG]), monkeypatch=monkeypatch)
    (text, *_) = ranks.work(rank, TIMEOUT_S + 2 * BEAT_S)
    assert text.startswith(
        f"no step has ended for 600 s (ddp_timeout): rank {rank} (process {rank} on node1) is at sel"
    )


def test_long_work_and_waits_for_it_within_ddp_timeout_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenization on rank 0; then a scoring pass on both; then both in one long call of the same line."""
    ranks = Ranks(HANG, WAIT, monkeypatch=monkeypatch)
    assert ranks.work(0, TIMEOUT_S - 2 * BEAT_S) == []
    ranks.at = [HANG._replace(steps=4), HANG._replace(steps=4)]
    for _ in range(10):
        assert ranks.work(0, TIMEOUT_S / 4) + ranks.work(1, TIMEOUT_S / 4) == []
    ranks.at = [HANG._replace(steps=5), HANG._replace(steps=5)]
    assert ranks.beat(10 * TIMEOUT_S) == []


def test_steps_that_take_longer_than_a_beat_are_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(WAIT, HANG, monkeypatch=monkeypatch)
    for steps in range(4, 14):
        ranks.at = [WAIT._replace(steps=steps), HANG._replace(steps=steps)]
        assert ranks.beat(TIMEOUT_S - BEAT_S) == []


def test_who_failed_first_is_known_to_all_and_the_reason_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(WAIT, HANG, WAIT, monkeypatch=monkeypatch)
    zero, one, two = ranks.watches
    assert not zero.others_failed()
    assert (one.first_failed(), two.first_failed(), one.first_failed()) == (1, 1, 1)
    assert zero.others_failed() and two.others_failed() and not one.others_failed()
    assert zero.round() is None and zero.failed_s == BEAT_S and one.round() is None and one.failed_s == 0
    assert zero.settle("because") and not two.settle("because") and two.round() == ""


def test_only_the_first_of_several_errors_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for their end by the launcher, which a busy machine may see late; bad input is said anyway."""
    slept: list[float] = []
    said: list[str] = []
    monkeypatch.setattr(watchdog.time, "sleep", slept.append)
    monkeypatch.setattr(watchdog, "_say", lambda kind, text: said.append(f"{kind}: {text}"))
    guards = []
    for watch in Ranks(WAIT, HANG, WAIT, HANG, monkeypatch=monkeypatch).watches:
        guard = object.__new__(watchdog._Guard)
        guard.watch, guard.ended = watch, threading.Event()
        guards.append(guard)
    gone = RuntimeError("[/x/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:24278. GLHF")
    assert guards[0].after(KeyError("first")) is None and slept == [0]
    assert guards[1].after(ValueError("second")) == 1 and slept == [0, 1, 60]
    assert guards[2].after(gone) == 1 and slept[3:] == [3, 60]
    assert guards[3].after(UserError("bad input")) is None and slept[5:] == [0] and said == []


def test_the_exit_code_is_that_of_the_end() -> None:
    """Of one process, which needs no watch."""

    def stopped() -> None:
        raise Stopped("after step 3")

    def fails() -> None:
        raise KeyError("own")

    assert (watchdog.watched(lambda: None, 10.0), watchdog.watched(stopped, 10.0)) == (0, 75)
    with pytest.raises(KeyError):
        watchdog.watched(fails, 10.0)


def test_a_rank_that_lost_another_one_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(watchdog.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(watchdog, "_say", lambda kind, text: said.append(f"{kind}: {text}"))
    ranks = Ranks(WAIT, HANG, monkeypatch=monkeypatch)
    guard = object.__new__(watchdog._Guard)
    guard.watch, guard.ended = ranks.watches[0], threading.Event()
    gone = RuntimeError("[/x/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:24278. GLHF")
    monkeypatch.setattr(watchdog, "has_ended", lambda beat: beat.rank == 1)
    assert guard.after(gone) == 69
    expected = (
        "lost: rank 1 (process 1 on node1) has ended without a word: it was last at select (mine.py:7) after step 3"
    )
    assert said == [expected]


def test_the_main_threads_line_is_the_users(tmp_path: Path) -> None:
    """As another thread sees it: in a library's wait, in a collective of the package, and with the same stack again."""
    seen: list[Standing] = []

    def look() -> None:
        time.sleep(0.1)
        seen.extend([main_thread(), main_thread()])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()  # this line
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.endswith("# this line"))
    standing.after_step(0)
    assert seen[0] == seen[1]
    assert seen[0][:2] == (f"test_the_main_threads_line_is_the_users ({__file__}:{line})", "")


def waiting_place() -> list[Any]:
    """Where rank 0 stands while it waits for rank 1 in a collective of the package."""
    seen: list[Standing] = []
    if dist.rank() == 0:
        thread = threading.Thread(target=lambda: (time.sleep(0.3), seen.append(main_thread())))
        thread.start()
        dist.barrier()
        thread.join()
    else:
        time.sleep(0.8)
        dist.barrier()
    return [list(at[:2]) for at in seen]


def groups_timeouts() -> float:
    """Seconds that DeepSpeed's own group waits."""
    import torch
    from deepspeed.utils import groups

    dist.let_all_groups_wait(47.0)
    backend = groups._clone_world_group()._get_backend(torch.device("cpu"))
    return float(backend.options._timeout.total_seconds())


def both_over_gloo() -> list[Any]:
    return [waiting_place(), groups_timeouts()]


def test_over_gloo_a_wait_is_seen_and_deepspeeds_groups_wait_as_long_as_they_are_told() -> None:
    (places, seconds), (_, other) = run_ranks("tests.utils.test_watchdog:both_over_gloo", 2)
    assert len(places) == 1 and places[0][1] == "barrier"
    assert re.match(r"waiting_place \(.*test_watchdog.py:\d+\)", places[0][0])
    assert seconds == other == 47.0


@pytest.mark.parametrize(
    ("text", "timeout", "others"),
    [
        ("[/x/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation", True, True),
        ("[/x/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:24278. GLHF", False, True),
        ("[/x/gloo/gloo/transport/tcp/pair.cc:1] op.preamble.length <= op.nbytes. 8 vs 4", False, False),
        ("my own request timed out", False, False),
    ],
)
def test_errors_that_come_of_other_ranks(text: str, timeout: bool, others: bool) -> None:
    assert (dist.is_timeout(RuntimeError(text)), dist.is_failure_of_others(RuntimeError(text))) == (timeout, others)
    assert not dist.is_failure_of_others(ValueError(text))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of launches of two ranks over gloo, of which rank 1 ends in each way; all at once."""
    out = {}
    for what in ("stopped", "hung", "fails", "vanishes", "ends"):
        folder = tmp_path_factory.mktemp(what)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "TMPDIR": str(folder)}
        words = [sys.executable, "-c", LAUNCH.replace("launch_worker", "watched_worker"), what]
        out[what] = subprocess.Popen(words, env=env, cwd=ROOT, text=True, stdout=-1, stderr=subprocess.STDOUT)
    found = {}
    for what, process in out.items():
        try:
            text = process.communicate(timeout=120)[0]
        finally:
            process.kill()
        found[what] = (process.returncode, text)
    return found


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        (
            "stopped",
            69,
            r"dataflex: error: rank 1 \(process \d+ on \S+\) has been silent for 3 s \(it is stopped\): it was last at "
            r"stopped \(.*watched_worker.py:\d+\) after step 7, and the other ranks cannot go on without it\n",
        ),
        (
            "hung",
            69,
            r"dataflex: error: no step has ended for 3 s \(ddp_timeout\): rank 1 \(process \d+ on \S+\) is at hung "
            r"\(.*watched_worker.py:\d+\) after step 7; rank 0 \(process \d+ on \S+\) is waiting in barrier, at work "
            r"\(.*watched_worker.py:\d+\) after step 7\n",
        ),
        (
            "fails",
            1,
            r"\[rank1\]: Traceback .*KeyError: 'of rank 1'\n"
            r"dataflex: error: a worker, or the launcher, ended with exit code 1; its messages are above\n",
        ),
        ("ends", 0, ""),
        ("vanishes", 7, r"dataflex: error: a worker, or the launcher, ended with exit code 7; .*\n"),
    ],
)
def test_a_rank_that_is_gone_is_the_one_that_is_told_of(
    ended: dict[str, tuple[int, str]], what: str, code: int, said: str
) -> None:
    assert ended[what][0] == code, ended[what]
    assert re.fullmatch(said, ended[what][1], re.DOTALL), ended[what][1]
    assert ended[what][1].count("Traceback") == (what == "fails")
