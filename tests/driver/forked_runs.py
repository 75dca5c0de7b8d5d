"""`dataflex-cli` as its launcher starts it on each rank, but forked: no import, so a hundred strikes take minutes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

from tests.distributed import forked_ranks


def command(_folder: str, _rank: int, words: str) -> None:
    """In a rank: run the command and end with its code."""
    from dataflex.cli import main
    from dataflex.worker import leave_with

    leave_with(lambda: main(json.loads(words)))


class ForkedRun:
    """The ranks of one start of ``dataflex-cli words...``; where one fails the others are killed, as launchers do."""

    def __init__(self, words: list[str], ranks: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.processes = forked_ranks(command, ranks, str(self.folder), json.dumps(words))

        self._failed: int | None = None

    @property
    def returncode(self) -> int | None:
        """0 where all ended well, the first other code where one did not, None while they run."""
        if self._failed is not None:
            return self._failed
        codes = [process.exitcode for process in self.processes]
        failed = [code for code in codes if code]
        self._failed = failed[0] if failed else None
        return failed[0] if failed else None if None in codes else 0

    def poll(self) -> int | None:
        return self.returncode

    def signal(self, who: str, number: signal.Signals) -> None:
        """``who``: "all", or "rank0", "rank1", ..."""
        for rank, process in enumerate(self.processes):
            if who in ("all", f"rank{rank}") and process.exitcode is None and process.pid is not None:
                os.kill(process.pid, number)

    def end(self, timeout_s: float) -> str:
        """Wait until every rank has ended; what they printed."""
        deadline = time.monotonic() + timeout_s
        while any(process.exitcode is None for process in self.processes):
            hung = time.monotonic() > deadline
            if hung or self.returncode not in (None, 75):
                self.kill()
            for process in self.processes:
                process.join(0.05)
            assert not hung, f"hung\n{self.output()}"
        text = self.output()
        shutil.rmtree(self.folder)
        return text

    def output(self) -> str:
        texts = [path.read_text(errors="replace") for path in sorted(self.folder.glob("*.txt"))]
        return "\n".join(f"rank {rank}:\n{text}" for rank, text in enumerate(texts))

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
