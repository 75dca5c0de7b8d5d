"""Sealed files: whatever bit is flipped, whatever else lies there, it is told in one line and never used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.utils.errors import UserError, cut, listed, shown
from dataflex.utils.records import DamagedError, FileRecord, InnerPath, Record, read_lines, read_sealed, write_sealed
from tests.faults import bit_flips


class Facts(Record):
    step: int
    names: dict[InnerPath, FileRecord]


def write(path: Path) -> Facts:
    (path.parent / "a.bin").write_bytes(b"abc")
    facts = Facts(step=123456, names={"a.bin": FileRecord.of(path.parent / "a.bin")})
    write_sealed(path, facts.model_dump())
    return facts


def test_a_sealed_file_comes_back(tmp_path: Path) -> None:
    facts = write(tmp_path / "f.json")
    assert read_sealed(tmp_path / "f.json", Facts) == facts
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc": FIPS 180-2, B.1
    assert facts.names["a.bin"] == FileRecord(size=3, sha256=digest)


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    facts = write(tmp_path / "f.json")
    for damaged in bit_flips(tmp_path / "f.json"):
        try:
            assert read_sealed(damaged, Facts) == facts, "a flip was taken"
        except DamagedError as error:
            assert "\n" not in str(error)


FORGED: dict[str, Callable[[Facts], dict[str, Any]]] = {
    "another type": lambda facts: {"step": "1", "names": {}},
    "a boolean for a number": lambda facts: {"step": True, "names": {}},
    "a key too many": lambda facts: facts.model_dump() | {"more": 1},
    "a key too few": lambda facts: {"step": 1},
    "a path that leads out": lambda facts: {"step": 1, "names": {"../x": facts.names["a.bin"].model_dump()}},
    "an absolute path": lambda facts: {"step": 1, "names": {"/etc/x": facts.names["a.bin"].model_dump()}},
    "a negative size": lambda facts: {"step": 1, "names": {"x": {"size": -1, "sha256": "0" * 64}}},
}


@pytest.mark.parametrize("case", FORGED)
def test_a_right_seal_is_not_enough(tmp_path: Path, case: str) -> None:
    facts = write(tmp_path / "f.json")
    write_sealed(tmp_path / "f.json", FORGED[case](facts))
    with pytest.raises(DamagedError, match="^f.json: "):
        read_sealed(tmp_path / "f.json", Facts)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{", b"\xff{}", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_what_is_no_record_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(DamagedError, match=r"^f\.json [^\n]{5,100}$"):
        read_sealed(tmp_path / "f.json", Facts)


def test_a_line_that_is_none_is_named_and_half_a_last_line_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read_lines(log, dict[str, int]) == [{"a": 1}, {"a": 2}]
    log.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(DamagedError, match="^line 2 of log.jsonl cannot be read as JSON"):
        read_lines(log, dict[str, int])


@pytest.mark.parametrize("name", ["..", "a/../b", "a/..", "./a", "a//b", "/a", "", "a\0b"])
def test_names_stay_below_their_folder(name: str, tmp_path: Path) -> None:
    facts = write(tmp_path / "f.json")
    content = facts.model_dump() | {"names": {name: facts.names["a.bin"].model_dump()}}
    write_sealed(tmp_path / "f.json", content)
    with pytest.raises(DamagedError, match="a path below the folder"):
        read_sealed(tmp_path / "f.json", Facts)


def test_long_values_are_cut_and_every_message_can_be_printed() -> None:
    assert cut("a" * 100, 11) == "aaaa...aaaa" and cut("abc") == "abc"
    assert shown("x" * 5000) == "'" + "x" * 29 + "..." + "x" * 28 + "'"
    assert shown(10**5000) == "<a whole number of 16,610 bits>"
    nested: Any = []
    for _ in range(5000):
        nested = [nested]
    assert shown(nested) == "[[[[[...]]]]]"
    assert shown({"a": [1, None, 2.5]}) == "{'a': [1, None, 2.5]}"
    assert listed(range(100), 3) == "0, 1, 2, ... (97 more)"
    assert cut("a\x1b[2Jb\tc") == "a\\x1b[2Jb\\tc"
    text = str(UserError("a \ud800 b\nnext " + "y" * 10_000))
    assert text.startswith("a \\ud800 b\nnext yyy") and max(map(len, text.splitlines())) == 2000
    json.dumps(text).encode("utf-8")
