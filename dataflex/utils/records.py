"""Small JSON files that the package writes for itself, read as if anything could be in them.

A *sealed* file is an object with the sha256 of the rest of it under ``seal``, so that a changed digit is seen as
well as a missing brace. What is read is then held against a pydantic type; nothing is used that does not fit.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dataflex.utils.errors import cut
from dataflex.utils.files import sha256_of, write_atomically

SEAL = "seal"
T = TypeVar("T")


class DamagedError(ValueError):
    """Why a file of our own cannot be used: one line without the file's name."""


class Record(BaseModel):
    """Base of what a file holds: exactly these keys, exactly these types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileRecord(Record):
    """What a manifest says of a file. size: bytes. sha256: hexadecimal."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """The record of the file as it lies on disk; reads it whole."""
        return cls(size=path.stat().st_size, sha256=sha256_of(path))

    def differs(self, path: Path) -> str | None:
        """Why ``path`` is not the file that was written, or None if it is; reads it whole."""
        try:
            if not path.is_file():
                return f"{path.name} is missing"
            if path.stat().st_size != self.size or sha256_of(path) != self.sha256:
                return f"{path.name} differs from what was written"
        except OSError as error:
            return f"{path.name} cannot be read ({error.strerror})"
        return None


def _inside(name: str) -> str:
    parts = name.split("/")
    if "\0" in name or "" in parts or ".." in parts or "." in parts:
        raise ValueError("expected a path below the folder")
    return name


InnerPath = Annotated[str, AfterValidator(_inside)]
"""A relative path that stays below its folder."""


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` (JSON-like, no key ``seal``) with its seal, atomically."""
    assert SEAL not in content
    write_atomically(path, json.dumps({**content, SEAL: _seal_of(content)}, indent=1))


def read_sealed(path: Path, kind: type[T]) -> T:
    """The content of a sealed file as ``kind``. DamagedError where it is not there, or not as it was written."""
    content = _json_of(path)
    if not isinstance(content, dict):
        raise DamagedError(f"{path.name} holds no object")
    seal = content.pop(SEAL, None)
    if seal != _seal_of(content):
        raise DamagedError(f"{path.name} is not as it was written (its seal does not fit)")
    checked: T = fitted(kind, content, path.name)
    return checked


def read_record(path: Path, kind: Any) -> Any:
    """The content of an unsealed JSON file as ``kind`` (any pydantic type). DamagedError where it is not that."""
    return fitted(kind, _json_of(path), path.name)


def read_lines(path: Path, kind: Any) -> list[Any]:
    """Each line of a .jsonl file as ``kind`` (any pydantic type). DamagedError naming the first line that is not that.

    A last line without an end, which a killed writer leaves, is not taken.
    """
    lines = _bytes_of(path).split(b"\n")
    return [
        fitted(kind, _parsed(line, f"line {number} of {path.name}"), f"line {number} of {path.name}")
        for number, line in enumerate(lines[:-1], start=1)
    ]


_checker = functools.cache(TypeAdapter)


def _seal_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read ({error.strerror})") from None


def _json_of(path: Path) -> Any:
    return _parsed(_bytes_of(path), path.name)


def _parsed(text: bytes, what: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{what} cannot be read as JSON ({type(error).__name__})") from None


def fitted(kind: Any, content: Any, what: str) -> Any:
    """``content`` as ``kind`` (any pydantic type). DamagedError naming the place in ``what`` that does not fit."""
    try:
        return _checker(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(cut(str(part), 40) for part in first["loc"])
        raise DamagedError(f"{what}: {place + ': ' if place else ''}{first['msg']}") from None
