"""What the ranks of a run tell each other of where they are, and what rank 0 makes of it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataflex.utils.standing import Standing, main_thread

BEAT_S = 5.0
SILENT_S = 300.0  # less where ddp_timeout is less
_NONE, _VERDICT, _FAILED = "-", "verdict", "failed"


@dataclass
class Beat:
    """What a rank tells of itself. still_s: for how long its main thread has not moved. ended: it needs no watch."""

    rank: int
    host: str
    pid: int
    count: int = 0
    step: int = 0
    place: str = ""
    waits: str = ""
    still_s: float = 0.0
    ended: bool = False

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def doing(self) -> str:
        return f"{f'waiting in {self.waits}, ' if self.waits else ''}at {self.place} after step {self.step}"


class Watch:
    """The beats of one rank and what it knows of the others'; `round` is called every ``beat_s`` by a thread.

    store: a `torch.distributed.Store` that all ranks share and no other thread of this one uses.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        timeout_s: float,
        beat_s: float = BEAT_S,
        look: Callable[[], Standing] = main_thread,
    ) -> None:
        self.store, self.world_size, self.timeout_s, self.beat_s, self.look = store, world_size, timeout_s, beat_s, look
        self.silent_s = min(SILENT_S, timeout_s)
        self.own = Beat(rank, socket.gethostname(), os.getpid())
        self.known: dict[int, Beat] = {}
        self.silence: dict[int, float] = {}
        self.rounds = 0
        self.failed_s = self.stuck_s = 0.0
        self._stack = 0
        self._cpu: dict[int, int] = {}
        if rank == 0:
            store.set(_VERDICT, _NONE)
            store.set(_FAILED, _NONE)
        self._tell()

    def round(self) -> str | None:
        """One beat: tell the others, read what they tell; why the run is to end here, if it is.

        "" where another rank has said it already.
        """
        self._tell()
        verdict, failed, beats = self._read(range(self.world_size) if self.own.rank == 0 else [0])
        self.rounds += 1
        if verdict != _NONE:
            return ""
        if failed != _NONE and int(failed) != self.own.rank:
            self.failed_s += self.beat_s
        progress = self._note(beats)
        if silent := self.silent():
            return self.said_silent(silent)
        self.stuck_s = 0.0 if progress else self.stuck_s + self.beat_s
        return self._stuck() if self.own.rank == 0 else None

    def silent(self) -> list[Beat]:
        """The ranks of which nothing was heard for too long."""
        return [beat for beat in self.known.values() if self.silence[beat.rank] >= self.silent_s]

    def everyone(self) -> list[Beat]:
        """The last beat of every rank."""
        return self._read(range(self.world_size))[2]

    def first_failed(self) -> int:
        """The rank that failed first, with an error of its own; this rank where it is the first."""
        mine = str(self.own.rank)
        answer: bytes = self.store.compare_set(_FAILED, _NONE, mine)
        return int(answer.decode())

    def others_failed(self) -> bool:
        """Whether another rank has failed, or said why the run ends."""
        verdict, failed, _ = self._read([])
        return verdict != _NONE or failed not in (_NONE, str(self.own.rank))

    def settle(self, text: str) -> bool:
        """Let ``text`` be why the run ends; False where another rank was first."""
        answer: bytes = self.store.compare_set(_VERDICT, _NONE, f"{self.own.rank} {text}")
        return answer.decode() == f"{self.own.rank} {text}"

    def compared(self) -> str:
        """Where the ranks are, the same places together: those first that no rank waits at, and the fewest."""
        places: dict[tuple[bool, str], list[Beat]] = {}
        for beat in self.everyone():
            places.setdefault((bool(beat.waits), beat.doing), []).append(beat)
        groups = sorted(places.items(), key=lambda item: (item[0][0], len(item[1])))
        verbs = ("are", "is")
        return "; ".join(f"{_names(beats)} {verbs[len(beats) == 1]} {doing}" for (_, doing), beats in groups)

    def said_silent(self, silent: list[Beat]) -> str:
        """Which rank is no longer heard of, for the screen."""
        beat = min(silent, key=lambda b: b.rank)
        more = f"; and so are {len(silent) - 1} more" if len(silent) > 1 else ""
        return (
            f"{beat.name} has been silent for {self.silent_s:.0f} s{_state(beat)}: it was last {beat.doing}, and the "
            f"other ranks cannot go on without it{more}"
        )

    def end(self) -> None:
        """Tell the others that this rank is not to be watched any more."""
        self.own.ended = True
        with contextlib.suppress(RuntimeError):  # rank 0, which has the store, may be gone
            self._tell()

    def _tell(self) -> None:
        now, own = self.look(), self.own
        own.still_s = own.still_s + self.beat_s if now.stack == self._stack else 0.0
        self._stack, own.place, own.waits, own.step = now.stack, now.place, now.waits, now.steps
        own.count += 1
        self.store.set(f"beat/{own.rank}", json.dumps(asdict(own)))

    def _read(self, ranks: Any) -> tuple[str, str, list[Beat]]:
        keys = [_VERDICT, _FAILED, *(f"beat/{rank}" for rank in ranks)]
        verdict, failed, *beats = (value.decode() for value in self.store.multi_get(keys))
        return verdict, failed, [Beat(**json.loads(beat)) for beat in beats]

    def _note(self, beats: list[Beat]) -> bool:
        """Take note of the others' beats; whether a rank's step is another one than in the round before."""
        progress = False
        for beat in beats:
            before = self.known.get(beat.rank)
            progress |= before is None or before.step != beat.step
            alive = before is None or before.count != beat.count or beat.ended or beat.rank == self.own.rank
            alive = self.works(beat) or alive
            self.silence[beat.rank] = 0.0 if alive else self.silence[beat.rank] + self.beat_s
            self.known[beat.rank] = beat
        return progress

    def works(self, beat: Beat) -> bool:
        """Whether a process of this machine has used its processor since the round before."""
        used = _cpu_ticks(beat.pid) if beat.host == self.own.host else 0
        more = used > self._cpu.get(beat.pid, used)
        self._cpu[beat.pid] = used
        return more

    def _stuck(self) -> str | None:
        if max(self.silence.values()) >= 2 * self.beat_s:  # the last beat of a stopped rank says nothing of now
            return None
        beats = [beat for beat in self.known.values() if not beat.ended]
        apart = len({(beat.step, beat.place) for beat in beats}) > 1
        if self.stuck_s < self.timeout_s or not apart or max(beat.still_s for beat in beats) < self.timeout_s:
            return None
        return f"no step has ended for {self.timeout_s:.0f} s (ddp_timeout): {self.compared()}"


def _names(beats: list[Beat]) -> str:
    if len(beats) == 1:
        return beats[0].name
    return f"ranks {', '.join(str(beat.rank) for beat in beats[:8])}{', ...' if len(beats) > 8 else ''}"


def _stat(pid: int) -> list[str]:
    """What Linux tells of a process: its state, ...; nothing where it is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []


def _cpu_ticks(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[11]) + int(fields[12]) if fields else 0


def has_ended(beat: Beat) -> bool:
    """Whether a process of this machine is known to be gone."""
    return beat.host == socket.gethostname() and (_stat(beat.pid) or ["Z"])[0] == "Z"


def _state(beat: Beat) -> str:
    """What this machine knows of the process, as an addition to a sentence."""
    if beat.host != socket.gethostname():
        return " (stopped, or its machine or network is gone)"
    return " (it has ended)" if has_ended(beat) else " (it is stopped)" if _stat(beat.pid)[0] in "Tt" else ""
