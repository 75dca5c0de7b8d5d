"""dataflex against LLaMA-Factory: token ids and labels of every template; steps, learning rates and losses of runs.

For the ids LLaMA-Factory is needed beside dataflex: ``pip install --no-deps llamafactory==0.9.5``. Its runs want the
versions that it asks for, so an environment of its own, which need not have dataflex.

    python benchmarks/against_llamafactory.py    # seconds; --golden FILE keeps ids for the tests
    python benchmarks/against_llamafactory.py --runs OTHER/bin/python    # minutes; --only TEXT: some of the cases

``--write`` keeps the table in results/, from where ``python -m tests.config.foreign_page`` takes it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llamafactory_cases import CASES, numbered, tokenizer
from llamafactory_runs import compare_runs, kept_rates, table_of_runs
from llamafactory_side import REASONS, compared, load, packed, theirs

from dataflex.data.encoding.formats import packaged_formats

RESULTS = Path(__file__).parent / "results"
KEPT = (
    "plain 0", "plain 1", "system 0", "multi-turn 0", "multi-turn 3", "tools 1", "tools 5", "mask_history 5",
    "mask_history 6", "truncation 5", "truncation 6", "truncation 11",
)  # fmt: skip


def compare_ids() -> dict[str, dict[str, str]]:
    """{template: {column: result}} over all cases; see `compared`."""
    load()
    found: dict[str, dict[str, str]] = {}
    for name in packaged_formats():
        found[name] = {}
        for column, cases in CASES.items():
            results = {compared(name, case, tokenizer) for case in cases}
            words = [word for word in ("DIFFERENT", "refused") if word in results]
            of_letters = "".join(results - {"DIFFERENT", "refused", "="})
            letters = "".join(letter for letter in REASONS if letter in of_letters)
            words += [letters] if letters else ["="] if "=" in results else []
            found[name][column] = " ".join(words)
        print(name, found[name], flush=True)
    return found


def keep(file: Path) -> None:
    """Ids and labels that LLaMA-Factory makes of some cases, without what `REASONS` lists."""
    cases = dict(numbered())
    made: dict[str, dict[str, object]] = {}
    for name in packaged_formats():
        made[name] = {}
        for number in KEPT:
            try:
                made[name][number] = packed(*theirs(name, cases[number], tokenizer(), plain=True))
            except (ValueError, RuntimeError):
                print(f"{name}: {number} is refused there")
    _write(file, made)


def _write(file: Path, made: dict[str, Any]) -> None:
    """A mapping as JSON, a line for each key."""
    lines = [f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in made.items()]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def table_of_ids(found: dict[str, dict[str, str]]) -> list[str]:
    """Markdown: templates by columns, and what the letters mean."""
    how = [
        "`=`: ids and labels are equal in all cases of the column. Letters: they are, but for what the list says; this "
        "is checked by leaving it out on both sides. `refused`: by both.\n"
    ]
    lines = ["| template | " + " | ".join(CASES) + " |", "| --- " * (len(CASES) + 1) + "|"]
    lines += [f"| `{name}` | " + " | ".join(row.values()) + " |" for name, row in sorted(found.items())]
    used = "".join(value for row in found.values() for value in row.values() if value != "refused")
    return [*how, *lines, "", *(f"- {letter}: {REASONS[letter].text}" for letter in REASONS if letter in used)]


def _say(what: str, how: str, versions: str, lines: list[str], write: bool) -> None:
    """Print a table, and keep it in results/ where ``write``."""
    text = "\n".join([f"`python benchmarks/against_llamafactory.py{how}` ({versions}):", "", *lines])
    print(text)
    if write:
        (RESULTS / f"against_llamafactory_{what}.md").write_text(text + "\n", encoding="utf-8")


def _versions(*names: str) -> str:
    return ", ".join(f"{name} {version(name)}" for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--golden", type=Path, help="write LLaMA-Factory's ids of some cases, or rates of its runs, here"
    )
    parser.add_argument("--runs", metavar="PYTHON", help="compare runs, those of LLaMA-Factory by this Python")
    parser.add_argument("--only", default="", help="with --runs: of the cases with this in their name")
    parser.add_argument("--write", action="store_true", help="write the table into results/")
    args = parser.parse_args()
    if args.runs:
        with tempfile.TemporaryDirectory() as folder:
            found = compare_runs(args.runs, Path(folder), args.only)
        there = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        here = _versions("transformers", "deepspeed", "torch")
        versions = f"{there}; dataflex with {here}; CPU"
        if args.golden:
            _write(args.golden, kept_rates(found["runs"]))
        _say("runs", " --runs PYTHON", versions, table_of_runs(found["runs"]), args.write)
        return
    load()
    if args.golden:
        keep(args.golden)
        return
    _say("ids", "", _versions("llamafactory", "transformers", "torch"), table_of_ids(compare_ids()), args.write)


if __name__ == "__main__":
    main()
