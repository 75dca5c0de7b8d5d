"""The demo's data: every answer is recomputed from the question's own words."""

from __future__ import annotations

import datetime
import json
import operator
import re
from fractions import Fraction
from pathlib import Path

import pytest

from dataflex.demo.generate import POOL_SIZES, TARGET_SIZE, generate

Row = dict[str, str]

OPERATIONS = {
    operator.sub: ("gave", "fewer"),
    operator.mul: ("each. How many",),
    operator.floordiv: ("equally", "equal bags"),
    operator.add: ("buys", "together"),
}
FACTORS = {
    "kilometres metres": 1000,
    "metres centimetres": 100,
    "kilograms grams": 1000,
    "litres millilitres": 1000,
    "hours minutes": 60,
    "minutes seconds": 60,
    "inches centimetres": Fraction("2.54"),
    "feet inches": 12,
    "miles kilometres": Fraction("1.609344"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    generate(path)
    return path


def read(folder: Path, name: str) -> list[Row]:
    rows: list[Row] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return rows


def day_in(text: str) -> datetime.date:
    return datetime.datetime.strptime(text, "%d %B %Y").date()


def check_arithmetic(row: Row) -> None:
    x, y = map(int, re.findall(r"\d+", row["instruction"]))
    (operation,) = [op for op, words in OPERATIONS.items() if any(w in row["instruction"] for w in words)]
    match = re.fullmatch(r"(\d+) \S (\d+) = (\d+) (\w+)", row["output"])
    assert match is not None and match[4] in row["instruction"]
    assert (int(match[1]), int(match[2]), int(match[3])) == (x, y, operation(x, y))
    if operation is operator.floordiv:
        assert x % y == 0


def check_strings(row: Row) -> None:
    text, task = row["input"], row["instruction"]
    words = text.split(" ")
    replaced = re.search(r"each letter (\w) in the text by (\S)\.", task)
    if replaced:
        expected = "".join(replaced[2] if c == replaced[1] else c for c in text)
    elif "backwards" in task:
        expected = "".join(reversed(text))
    elif "capital" in task:
        expected = text.upper()
    elif "vowel" in task:
        expected = re.sub("[aeiou]", "", text)
    elif "alphabetical" in task:
        expected = " ".join(sorted(words))
    elif "hyphens" in task:
        expected = text.replace(" ", "-")
    else:
        assert "first letter of each word" in task
        expected = " ".join(w[0] for w in words)
    assert row["output"] == expected


def check_units(row: Row) -> None:
    match = re.fullmatch(r"([\d.]+) (\w+) are ([\d.]+) (\w+)", row["output"])
    assert match is not None
    assert re.search(rf" {re.escape(match[1])} {match[2]}\b", row["instruction"])
    assert re.search(rf" {match[4]}\b", row["instruction"])
    assert Fraction(match[3]) == Fraction(match[1]) * FACTORS[f"{match[2]} {match[4]}"]


def check_dates(row: Row) -> None:
    question, answer = row["instruction"], row["output"]
    if weekday := re.fullmatch(r"Which day of the week is (.+)\?", question):
        assert answer == f"{weekday[1]} is a {day_in(weekday[1]):%A}"
    elif between := re.fullmatch(r"How many days is it from (.+) to (.+)\?", question):
        days = (day_in(between[2]) - day_in(between[1])).days
        assert answer == f"{between[2]} is {days} days after {between[1]}"
    else:
        match = re.fullmatch(r"What date is ((\d+) (days|weeks) (before|after) (.+))\?", question)
        assert match is not None and answer.startswith(f"{match[1]} is ")
        distance = datetime.timedelta(**{match[3]: int(match[2])})
        found = day_in(answer.removeprefix(f"{match[1]} is "))
        assert found - day_in(match[5]) == (distance if match[4] == "after" else -distance)


CHECKS = {
    "arithmetic": check_arithmetic,
    "strings": check_strings,
    "units": check_units,
    "dates": check_dates,
    "dates_target": check_dates,
}


@pytest.mark.parametrize("name", CHECKS)
def test_answers_are_right(folder: Path, name: str) -> None:
    for row in read(folder, name):
        CHECKS[name](row)


def test_sets_are_named_sized_and_disjoint(folder: Path) -> None:
    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    assert info == {name: {"file_name": f"{name}.json"} for name in CHECKS}
    rows = {name: read(folder, name) for name in CHECKS}
    assert {name: len(r) for name, r in rows.items()} == POOL_SIZES | {"dates_target": TARGET_SIZE}
    questions = [(row["instruction"], row["input"]) for r in rows.values() for row in r]
    assert len(set(questions)) == len(questions)


def test_the_seed_decides_every_byte(folder: Path, tmp_path: Path) -> None:
    generate(tmp_path / "same", seed=0)
    generate(tmp_path / "other", seed=1)
    for name in CHECKS:
        file = f"{name}.json"
        assert (tmp_path / "same" / file).read_bytes() == (folder / file).read_bytes()
        assert (tmp_path / "other" / file).read_bytes() != (folder / file).read_bytes()
