"""One task maker per domain: each draws from a generator and returns an alpaca row with its right answer.

A row is ``{"instruction", "input", "output"}``; ``input`` is empty except in string edits.
"""

from __future__ import annotations

import random
from datetime import date, timedelta
from decimal import Decimal

Row = dict[str, str]

NAMES = (
    "Ada",
    "Ben",
    "Chen",
    "Dora",
    "Emil",
    "Fatima",
    "Goran",
    "Hana",
    "Ivan",
    "Jana",
    "Kofi",
    "Lena",
    "Mia",
    "Noor",
    "Omar",
    "Petra",
)
THINGS = (
    "apples",
    "books",
    "coins",
    "eggs",
    "maps",
    "nails",
    "pears",
    "plums",
    "shells",
    "stamps",
    "tiles",
    "tulips",
)
STORIES = (
    ("+", "{name} has {x} {things} and buys {y} more. How many {things} does {name} have now?"),
    ("+", "{name} found {x} {things} on Monday and {y} {things} on Tuesday. How many is that together?"),
    ("-", "{name} had {x} {things} and gave {y} of them to {other}. How many {things} are left?"),
    ("-", "{other} has {x} {things}, and {name} has {y} fewer. How many {things} does {name} have?"),
    ("*", "{name} fills {x} boxes with {y} {things} each. How many {things} are in the boxes?"),
    ("*", "{x} friends bring {name} {y} {things} each. How many {things} does {name} get?"),
    ("/", "{name} shares {x} {things} equally among {y} friends. How many does each friend get?"),
    ("/", "{name} packs {x} {things} into {y} equal bags. How many {things} are in one bag?"),
)

WORDS = (
    "anchor",
    "basket",
    "candle",
    "dragon",
    "engine",
    "forest",
    "garden",
    "harbor",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "magnet",
    "needle",
    "orange",
    "pencil",
    "quarry",
    "ribbon",
    "saddle",
    "temple",
    "umbrella",
    "valley",
    "window",
    "yellow",
    "zipper",
    "button",
    "copper",
    "desert",
    "falcon",
    "lantern",
    "marble",
    "nickel",
    "oyster",
    "puzzle",
    "rocket",
    "silver",
    "timber",
    "velvet",
    "walnut",
    "meadow",
)
VOWELS = "aeiou"

UNITS = (
    ("kilometres", "metres", "1000"),
    ("metres", "centimetres", "100"),
    ("kilograms", "grams", "1000"),
    ("litres", "millilitres", "1000"),
    ("hours", "minutes", "60"),
    ("minutes", "seconds", "60"),
    ("inches", "centimetres", "2.54"),
    ("feet", "inches", "12"),
    ("miles", "kilometres", "1.609344"),
)
CONVERSIONS = ("Convert {x} {source} to {target}.", "How many {target} are {x} {source}?")

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
WEEKDAYS = (
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
)


def _row(instruction: str, output: str, given: str = "") -> Row:
    return {"instruction": instruction, "input": given, "output": output}


def arithmetic(rng: random.Random) -> Row:
    """A word problem with one sum, difference, product or quotient of whole numbers."""
    operator, story = rng.choice(STORIES)
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    x, y = rng.randint(20, 99), rng.randint(3, 19)
    if operator == "/":
        x *= y
    result = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[operator]
    question = story.format(name=name, other=other, things=things, x=x, y=y)
    return _row(question, f"{x} {operator} {y} = {result} {things}")


def strings(rng: random.Random) -> Row:
    """An edit of two or three words: reversing, capitals, vowels, letters, order."""
    words = rng.sample(WORDS, rng.randint(2, 3))
    text = " ".join(words)
    letter = rng.choice(sorted(set(text) - {" "}))
    sign = rng.choice("*#+_")
    edits = (
        ("Write the text backwards.", text[::-1]),
        ("Write the text in capital letters.", text.upper()),
        ("Remove every vowel from the text.", "".join(c for c in text if c not in VOWELS)),
        (f"Replace each letter {letter} in the text by {sign}.", text.replace(letter, sign)),
        ("Put the words of the text in alphabetical order.", " ".join(sorted(words))),
        ("Join the words of the text with hyphens.", "-".join(words)),
        ("Write the first letter of each word of the text.", " ".join(word[0] for word in words)),
    )
    instruction, output = rng.choice(edits)
    return _row(instruction, output, text)


def units(rng: random.Random) -> Row:
    """A conversion between two units of length, weight, volume or time, exact to the last digit."""
    source, target, factor = rng.choice(UNITS)
    x = Decimal(rng.randint(2, 400)) / rng.choice((1, 1, 2))
    question = rng.choice(CONVERSIONS).format(x=_plain(x), source=source, target=target)
    return _row(question, f"{_plain(x)} {source} are {_plain(x * Decimal(factor))} {target}")


def dates(rng: random.Random) -> Row:
    """A date so many days or weeks away from another, a day of the week, or the days between two dates."""
    day = date(2000, 1, 1) + timedelta(days=rng.randrange(40 * 365))
    count = rng.randint(2, 60)
    kind = rng.choice(("after", "before", "weeks", "weekday", "between"))
    if kind == "weekday":
        return _row(f"Which day of the week is {_said(day)}?", f"{_said(day)} is a {WEEKDAYS[day.weekday()]}")
    if kind == "between":
        end = day + timedelta(days=count)
        question = f"How many days is it from {_said(day)} to {_said(end)}?"
        return _row(question, f"{_said(end)} is {count} days after {_said(day)}")
    steps = {"after": count, "before": -count, "weeks": 7 * count}
    unit, side = ("weeks" if kind == "weeks" else "days"), ("before" if kind == "before" else "after")
    place = f"{count} {unit} {side} {_said(day)}"
    return _row(f"What date is {place}?", f"{place} is {_said(day + timedelta(days=steps[kind]))}")


def _plain(number: Decimal) -> str:
    """The number without an exponent and without zeros at its end."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _said(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"
