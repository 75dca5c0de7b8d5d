"""The one exception for what a user can mend, and what its text is made of: the nearest match, values cut short."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

LONGEST_VALUE, LONGEST_LINE, MOST_NAMES = 60, 2000, 30
_BIG = 10**18


class UserError(ValueError):
    """Bad input: one line saying what was wrong, where (file:key or file:row) and what is valid.

    Whatever a value brought into the text, it can be printed and written as UTF-8, and no line is endless.
    """

    def __init__(self, text: str) -> None:
        super().__init__("\n".join(cut(line, LONGEST_LINE) for line in text.split("\n")))


class _Short(reprlib.Repr):
    """`repr` that neither walks all through a deep or long value nor spells out thousands of digits."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.maxlevel, self.maxother, self.maxstring = 4, length, length
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 8

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if -_BIG < x < _BIG else f"<a whole number of {x.bit_length():,} bits>"


def cut(text: str, length: int = LONGEST_VALUE) -> str:
    """``text`` on one line, what cannot be printed escaped, without its middle where it is longer than ``length``."""
    text = _without_middle(text, length)
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _without_middle(text: str, length: int) -> str:
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[: length - 3 - half]}...{text[-half:]}"


def shown(value: object, length: int = LONGEST_VALUE) -> str:
    """A value as messages show it: its repr, cut short."""
    if isinstance(value, str):
        return repr(_without_middle(value, length))
    return cut(_Short(length).repr(value), length)


def listed(names: Iterable[object], most: int = MOST_NAMES) -> str:
    """Names with commas, long ones cut, the first ``most`` of them."""
    found = [cut(str(name)) for name in names]
    more = f", ... ({len(found) - most} more)" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest entry of ``valid``, or an empty string."""
    match = difflib.get_close_matches(cut(str(word), 200), [str(v) for v in valid][:1000], n=1, cutoff=0.6)
    return f" (did you mean '{cut(match[0])}'?)" if match else ""


def brief(exc: BaseException) -> str:
    """The message of an exception on one line, without what a library goes on to advise."""
    words = " ".join(str(exc).split()) or type(exc).__name__
    return words if len(words) <= 200 else words[:200] + "..."
