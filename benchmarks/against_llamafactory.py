"""dataflex against LLaMA-Factory: token ids and labels of every template.

LLaMA-Factory is needed beside it: ``pip install --no-deps llamafactory==0.9.5``.

    python benchmarks/against_llamafactory.py    # seconds; --golden FILE keeps ids for the tests

``--write`` keeps the table in results/, from where ``python -m tests.config.foreign_page`` takes it.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

from llamafactory_cases import CASES, numbered, tokenizer
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
    lines = [f"{json.dumps(name)}: {json.dumps(ids, separators=(',', ':'))}" for name, ids in made.items()]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, help="write LLaMA-Factory's ids of some cases here, and end")
    parser.add_argument("--write", action="store_true", help="write the table into results/")
    args = parser.parse_args()
    load()
    if args.golden:
        keep(args.golden)
        return
    lines = table_of_ids(compare_ids())
    versions = ", ".join(f"{name} {version(name)}" for name in ("llamafactory", "transformers", "torch"))
    lines = [
        f"`python benchmarks/against_llamafactory.py` ({versions}):",
        "",
        *lines,
    ]
    print("\n".join(lines))
    if args.write:
        file = RESULTS / "against_llamafactory_ids.md"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
