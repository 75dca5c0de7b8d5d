"""Every key of LLaMA-Factory and of transformers is ours or in the table, and the page says what the table says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from dataflex.config import load_config
from dataflex.config.foreign.keys import table
from dataflex.config.schema import SECTION_OF
from dataflex.config.yaml_reader import read_mapping
from dataflex.utils.errors import UserError
from tests.config import foreign_page

ROOT = Path(__file__).resolve().parents[2]


def keys() -> list[str]:
    """Those of LLaMA-Factory 0.9.5's argument classes, and of the installed transformers' TrainingArguments."""
    from transformers import Seq2SeqTrainingArguments

    listed = Path(__file__).with_name("llamafactory_keys.txt").read_text().split()
    return sorted({*listed, *(f.name for f in dataclasses.fields(Seq2SeqTrainingArguments))})


def test_every_key_has_one_treatment() -> None:
    assert [key for key in keys() if key not in SECTION_OF and table().treatment(key) is None] == []
    assert [key for key in SECTION_OF if table().treatment(key) is not None] == []
    assert set(table().spellings.values()) <= set(SECTION_OF)


def test_every_row_of_the_table_has_a_reason_that_a_user_is_told() -> None:
    for key, reason in table().ignored:
        name = key.replace("*", "x")
        notes = load_config({"max_steps": 1, name: "asked"}, embedded=True, quiet=True).notes
        assert notes == (f"config:{name}: ignored: {reason}",), key


def test_the_page_is_made_from_the_table() -> None:
    page = (ROOT / "docs/coming_from_llamafactory.md").read_text(encoding="utf-8")
    assert page == foreign_page.text(), "run: python -m tests.config.foreign_page"


SKELETONS = read_mapping(Path(__file__).with_name("skeletons.yaml"), "skeletons")


@pytest.mark.parametrize("kind", SKELETONS["KINDS"])
def test_yamls_of_the_kinds_that_are_written_load_or_are_refused_with_their_lines(tmp_path: Path, kind: str) -> None:
    skeleton = SKELETONS["KINDS"][kind]
    base = {} if skeleton.get("alone") else SKELETONS["BASE"] | SKELETONS["LORA"]
    keys = {key: value for key, value in (base | skeleton["keys"]).items() if value is not None}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    found: list[str] = []
    try:
        load_config(tmp_path / "run.yaml", quiet=True, command=skeleton.get("command", "train"))
    except UserError as refusal:
        found = str(refusal).replace(f"{tmp_path}/run.yaml:", "").splitlines()
    assert found == skeleton.get("lines", [])
