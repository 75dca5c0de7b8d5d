"""The table of faults fits the code as it is: one whose text is gone would be planted nowhere and missed by nobody."""

from __future__ import annotations

import re
from collections import Counter

from tests.mutants.table import ROOT, Mutant, read

MUTANTS = read()


def files_of(mutant: Mutant) -> list[tuple[str, str]]:
    """(file, name of the test function or "") of the tests that it names."""
    return [(file, test.partition("[")[0]) for file, _, test in (name.partition("::") for name in mutant.tests)]


def test_every_text_stands_once_in_its_file_and_becomes_another() -> None:
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in {mutant.file for mutant in MUTANTS}}
    wrong = {mutant.name: texts[mutant.file].count(mutant.find) for mutant in MUTANTS}
    assert {name: count for name, count in wrong.items() if count != 1} == {}
    assert [mutant.name for mutant in MUTANTS if mutant.find == mutant.put] == []


def test_every_test_that_is_named_is_there() -> None:
    missing = []
    for mutant in MUTANTS:
        assert mutant.tests, mutant.name
        for file, test in files_of(mutant):
            text = (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).is_file() else ""
            if not text or (test and not re.search(rf"^def {test}\(", text, re.MULTILINE)):
                missing.append(f"{mutant.name}: {file}::{test}")
    assert missing == []


def test_every_room_has_faults_and_every_fault_a_name_of_its_own() -> None:
    rooms = {path.stem for path in (ROOT / "dataflex").iterdir() if path.suffix in ("", ".py")} | {"csrc"}
    counts = Counter(mutant.room for mutant in MUTANTS)
    assert {room for room in rooms if not room.startswith("_")} - set(counts) == set()
    assert len(MUTANTS) >= 300
    assert [name for name, times in Counter(mutant.name for mutant in MUTANTS).items() if times > 1] == []


def test_every_fault_is_python() -> None:
    """A fault that does not compile is seen by whatever imports it, which says nothing of a test."""
    for mutant in MUTANTS:
        if mutant.file.endswith(".py"):
            text = (ROOT / mutant.file).read_text(encoding="utf-8")
            compile(text.replace(mutant.find, mutant.put), f"{mutant.file} ({mutant.name})", "exec")
