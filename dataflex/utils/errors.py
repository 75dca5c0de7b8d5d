"""The one exception for what a user can mend, and the nearest match that its text offers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: one line saying what was wrong, where (file:key or file:row) and what is valid."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest entry of ``valid``, or an empty string."""
    match = difflib.get_close_matches(str(word), [str(v) for v in valid], n=1, cutoff=0.6)
    return f" (did you mean '{match[0]}'?)" if match else ""
