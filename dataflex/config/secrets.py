"""Passwords and access tokens: what a configuration holds is written into the run's folder, so it may hold none."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from dataflex.utils.errors import cut

_KEY = re.compile(r"api_?key|password|secret|(access|auth|hub|hf)_?token", re.IGNORECASE)
_VALUE = re.compile(
    r"://[^/\s@]*:[^/\s@]+@|\b(?:hf|sk|gh[opsu])_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[0-9A-Z]{16}\b"
)
_DEEPEST = 20
NO_SECRET = "is a password or an access token, which would be written into the run's folder: set it in the environment"


def is_secret(text: str) -> bool:
    """Whether ``text`` holds a URL with a password, or what the hubs' and clouds' access tokens look like."""
    return _VALUE.search(text) is not None


def secret_places(value: Any, place: str = "", depth: int = 0) -> Iterator[str]:
    """The places (a.b.0) of texts in mappings and lists that are secrets by what they look like, or by their key."""
    if depth > _DEEPEST:
        return
    if isinstance(value, Mapping):
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(number), inner) for number, inner in enumerate(value)]
    else:
        items = []
    for key, inner in items:
        here = f"{place}.{'...' if is_secret(key) else cut(key)}".lstrip(".")
        told = isinstance(value, Mapping) and _KEY.search(key) is not None
        if is_secret(key) or (isinstance(inner, str) and inner and (told or is_secret(inner))):
            yield here
        yield from secret_places(inner, here, depth + 1)
