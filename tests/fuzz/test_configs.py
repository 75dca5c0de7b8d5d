"""Configurations of any content: a checked Config that comes back from its own file, or UserErrors; nothing else."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataflex.config import load_config
from dataflex.config.schema import SECTION_OF
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

BASE = {"model_name_or_path": "some/model", "dataset": "a", "output_dir": "out", "template": "default"}
WORDS = [
    *(
        "auto",
        "no",
        "true",
        "static",
        "dynamic_mix",
        "dynamic_select",
        "less",
        "odm",
        "1e-4",
        "~/x",
        "a,b",
        "\0",
        "\ud800",
    ),
    *(
        "x" * 5000,
        "x/" * 3000,
        "",
        " ",
        "../..",
        "{}",
        "ds_zero3.json",
        "components.yaml",
        "w*2",
        "w.npy",
        "log(w,2,3)",
    ),
]
SCALAR = (
    st.none() | st.booleans() | st.integers(-5, 5) | st.integers() | st.floats() | st.text(max_size=12)
    | st.sampled_from(WORDS) | st.sampled_from([10**400, 2**63, 2**64, -(2**63), 1e308, 5e-324])
)  # fmt: skip
VALUE = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALAR.filter(lambda v: v == v), inner, max_size=3),
    max_leaves=6,
)
KEY = st.sampled_from(sorted(SECTION_OF)) | st.sampled_from(
    ["learning_rat", "pref_beta", "do_eval", "mix_strategy", ""]
)
GIVEN = st.dictionaries(KEY, VALUE, min_size=1, max_size=5)
TEXT = st.text(alphabet="abc:-{}[]&*!<>|'\"#%@,.? \n\t0159_é\0", max_size=80)
QUIET = {"deadline": 5000, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "level", logging.CRITICAL)


def told(error: UserError) -> None:
    lines = str(error).splitlines()
    assert lines and all(0 < len(line) <= 2000 for line in lines)
    str(error).encode("utf-8")


def load_mapping(given: dict[Any, Any], with_base: bool) -> None:
    try:
        cfg = load_config({**BASE, **given} if with_base else given)
    except UserError as error:
        told(error)
        return
    text = yaml.safe_dump(cfg.dump_flat())
    again = load_config(yaml.safe_load(text))
    assert yaml.safe_dump(again.dump_flat()) == text  # a nan is not equal to itself


def load_text(folder: Path, text: bytes) -> None:
    (folder / "run.yaml").write_bytes(text)
    try:
        load_config(folder / "run.yaml")
    except UserError as error:
        told(error)


def load_overrides(folder: Path, words: list[str]) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(BASE))
    try:
        load_config(folder / "run.yaml", words)
    except UserError as error:
        told(error)


def load_deepspeed(folder: Path, config: Any) -> None:
    (folder / "ds.json").write_text(json.dumps(config, default=str))
    load_mapping({"deepspeed": str(folder / "ds.json")}, True)
    load_mapping({"deepspeed": config}, True)


BLOCK = st.dictionaries(st.sampled_from(["stage", "enabled", "params", "zero_hpz_partition_size"]), VALUE, max_size=3)
DEEPSPEED = st.dictionaries(
    st.sampled_from(["zero_optimization", "bf16", "optimizer", "tensor_parallel", "compile", "x", "gradient_clipping"]),
    VALUE | BLOCK,
    max_size=3,
)


@settings(max_examples=300, **QUIET)
@given(given=GIVEN, with_base=st.booleans())
def test_values_of_any_type(given: dict[Any, Any], with_base: bool) -> None:
    load_mapping(given, with_base)


@settings(max_examples=200, **QUIET)
@given(text=TEXT.map(lambda t: t.encode("utf-8", "surrogatepass")) | st.binary(max_size=60))
def test_texts_that_are_no_yaml(tmp_path: Path, text: bytes) -> None:
    load_text(tmp_path, text)


@settings(max_examples=100, **QUIET)
@given(words=st.lists(st.tuples(KEY, TEXT).map("=".join) | TEXT, max_size=3), config=DEEPSPEED)
def test_overrides_and_deepspeed_configs(tmp_path: Path, words: list[str], config: Any) -> None:
    load_overrides(tmp_path, words)
    load_deepspeed(tmp_path, config)


@pytest.mark.slow
@settings(max_examples=10_000, **QUIET)
@given(given=GIVEN, with_base=st.booleans())
def test_thousands_of_values(given: dict[Any, Any], with_base: bool) -> None:
    load_mapping(given, with_base)


@pytest.mark.slow
@settings(max_examples=4000, **QUIET)
@given(
    text=TEXT.map(lambda t: t.encode("utf-8", "surrogatepass")) | st.binary(max_size=60),
    words=st.lists(st.tuples(KEY, TEXT).map("=".join) | TEXT, max_size=3),
    config=DEEPSPEED,
)
def test_thousands_of_texts(tmp_path: Path, text: bytes, words: list[str], config: Any) -> None:
    load_text(tmp_path, text)
    load_overrides(tmp_path, words)
    load_deepspeed(tmp_path, config)
