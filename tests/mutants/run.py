"""Plants the faults of the table one at a time and runs the tests that should see each: `make mutants`.

Everything happens in a copy of the working tree. A row of the CSV is written for each fault as soon as it is known, and
a campaign that is started again goes on with the rows that are missing. A failing test counts only if it passes
without the fault. Exit code: 0, or 1 where a fault survived or a row is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.table import ROOT, Mutant, read

COLUMNS = ("name", "room", "kind", "file", "outcome", "seconds", "by")
SEEN, SURVIVED, TIMED_OUT, WRONG = "seen", "survived", "timed out", "wrong row"
NOTHING_RAN = (3, 4, 5)  # of pytest: an error of its own, unknown tests, none selected


def copy_tree(folder: Path) -> None:
    """The files of the working tree that git knows or would take, as they lie there."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


class Bench:
    """A copy of the tree in which one fault at a time is planted."""

    def __init__(self, folder: Path, limit_s: float) -> None:
        self.folder, self.limit_s = folder, limit_s
        copy_tree(folder)
        env = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "tests.mutants.warm"]
        pipe = subprocess.PIPE
        self.warm = subprocess.Popen(words, cwd=folder, env=env, stdin=pipe, stdout=pipe, text=True)

    def plant(self, mutant: Mutant) -> str:
        """Put the fault in; the text of the file before."""
        path = self.folder / mutant.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.find) != 1:
            raise ValueError(f"{mutant.file} has the text {text.count(mutant.find)} times")
        self._write(path, text.replace(mutant.find, mutant.put))
        return text

    def restore(self, mutant: Mutant, text: str) -> None:
        self._write(self.folder / mutant.file, text)

    def _write(self, path: Path, text: str) -> None:
        """Python takes compiled files of the same second and size for up to date: they go."""
        path.write_text(text, encoding="utf-8")
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()

    def pytest(self, tests: Sequence[str]) -> tuple[int | None, str]:
        """Exit code (None: the time was over) and the first line that says what failed."""
        said = self.folder / ".said.txt"
        how = ["-q", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=line", "--assert=plain"]
        assert self.warm.stdin is not None and self.warm.stdout is not None
        print(json.dumps({"args": [*how, *tests], "said": str(said), "limit_s": self.limit_s}), file=self.warm.stdin)
        self.warm.stdin.flush()
        code: int | None = json.loads(self.warm.stdout.readline())
        with said.open(encoding="utf-8", errors="replace") as lines:
            return code, next((line[:200].strip() for line in lines if re.match(r"FAILED|ERROR", line)), "")

    def close(self) -> None:
        assert self.warm.stdin is not None
        self.warm.stdin.close()
        self.warm.wait()


class Campaign:
    """Works through ``todo`` and appends to the file ``results``."""

    def __init__(self, todo: Sequence[Mutant], results: Path, limit_s: float, until: float, trusted: bool) -> None:
        self.results, self.limit_s, self.until, self.trusted = results, limit_s, until, trusted
        self.lock = threading.Lock()
        self.passes: dict[tuple[str, ...], bool] = {}
        self.waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
        for mutant in todo:
            self.waiting.put(mutant)

    def run(self, jobs: int) -> None:
        workers = [threading.Thread(target=self._work) for _ in range(jobs)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def _work(self) -> None:
        with (
            tempfile.TemporaryDirectory(prefix="dataflex-mutants-") as folder,
            contextlib.closing(Bench(Path(folder), self.limit_s)) as bench,
            contextlib.suppress(queue.Empty),
        ):
            while time.monotonic() < self.until:
                mutant = self.waiting.get_nowait()
                started = time.monotonic()
                outcome, by = self._try(bench, mutant)
                self._note(mutant, outcome, time.monotonic() - started, by)

    def _try(self, bench: Bench, mutant: Mutant) -> tuple[str, str]:
        try:
            text = bench.plant(mutant)
        except ValueError as error:
            return WRONG, str(error)
        try:
            code, by = bench.pytest(mutant.tests)
        finally:
            bench.restore(mutant, text)
        if code is None:
            return TIMED_OUT, by
        if code == 0:
            return SURVIVED, ""
        if code in NOTHING_RAN:
            return WRONG, f"pytest ran nothing of {' '.join(mutant.tests)}"
        return (SEEN, by) if self._sound(bench, mutant.tests) else (WRONG, f"fails without the fault: {by}")

    def _sound(self, bench: Bench, tests: tuple[str, ...]) -> bool:
        """Whether the tests pass without a fault."""
        if not self.trusted and tests not in self.passes:
            self.passes[tests] = bench.pytest(tests)[0] == 0
        return self.trusted or self.passes[tests]

    def _note(self, mutant: Mutant, outcome: str, seconds: float, by: str) -> None:
        row = (mutant.name, mutant.room, mutant.kind, mutant.file, outcome, f"{seconds:.0f}", by)
        with self.lock:
            new = not self.results.exists()
            with self.results.open("a", newline="", encoding="utf-8") as handle:
                csv.writer(handle).writerows([COLUMNS, row] if new else [row])
            print(f"{outcome:9}  {seconds:4.0f} s  {mutant.room}: {mutant.name}", flush=True)


def known(results: Path) -> dict[str, dict[str, str]]:
    """{name: row} of an earlier start, the last row of a name counting."""
    if not results.exists():
        return {}
    with results.open(newline="", encoding="utf-8") as handle:
        return {row["name"]: row for row in csv.DictReader(handle)}


def report(chosen: Sequence[Mutant], results: Path) -> list[str]:
    """The share that was seen, and every fault that was not."""
    rows = {name: row for name, row in known(results).items() if name in {mutant.name for mutant in chosen}}
    found = [row["outcome"] for row in rows.values()]
    seen = found.count(SEEN)
    counts = ", ".join(f"{found.count(what)} {what}" for what in (SURVIVED, TIMED_OUT, WRONG))
    lines = [f"{seen} of {len(found)} faults seen ({seen / max(1, len(found)):.1%}), {counts}; {len(chosen)} in all"]
    for row in rows.values():
        if row["outcome"] != SEEN:
            lines.append(f"{row['outcome']}: {row['file']}: {row['name']} ({row['kind']}) {row['by']}".rstrip())
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "mutants.csv", help="the CSV to go on with")
    parser.add_argument("--only", metavar="PATTERN", default="", help="faults whose file, kind or name matches")
    parser.add_argument("--random", type=int, metavar="N", help="N faults drawn by --seed")
    parser.add_argument("--seed", type=int, default=int(time.time()) // 86400, help="default: the day")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults at a time, each in a copy of its own")
    parser.add_argument("--limit", type=float, default=300.0, metavar="S", help="seconds for the tests of one fault")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="M", help="begin no fault after that")
    parser.add_argument("--anew", action="store_true", help="forget what the CSV says of the chosen faults")
    parser.add_argument("--trusted", action="store_true", help="the tests are known to pass without a fault")
    return parser.parse_args()


def main() -> int:
    args = parse()
    chosen = [m for m in read() if re.search(args.only, f"{m.file} {m.kind} {m.name}")]
    if args.random is not None:
        chosen = random.Random(args.seed).sample(chosen, min(args.random, len(chosen)))
        print(f"{len(chosen)} faults, drawn by --seed {args.seed}")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    done = {} if args.anew else known(args.results)
    todo = [mutant for mutant in chosen if mutant.name not in done]
    until = time.monotonic() + 60 * args.minutes
    Campaign(todo, args.results, args.limit, until, args.trusted).run(args.jobs)
    print("\n".join(report(chosen, args.results)))
    outcomes = known(args.results)
    return int(any(outcomes[m.name]["outcome"] != SEEN for m in chosen if m.name in outcomes))


if __name__ == "__main__":
    sys.exit(main())
