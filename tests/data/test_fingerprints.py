"""What tokens are made from: one ingredient at a time changes and they are made anew; nothing does and they stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.config import Config
from dataflex.config.schema import DataSection, MethodSection, TrainSection
from dataflex.config.sections.weighting import WeightingSection
from dataflex.data.encoding.encode import tokenizer_identity
from dataflex.data.encoding.token_weights import TokenWeights
from dataflex.data.encoding.tokenize import Encoder, Settings
from dataflex.data.load import load_data
from dataflex.data.pool import Pool
from dataflex.data.sources import source
from dataflex.data.sources.info import Columns, DatasetInfo, Tags
from tests import tiny_engine as tiny
from tests.data.conftest import ROWS
from tests.tiny import byte_tokenizer

SAME, POOL, TOKENS = "the same pool", "another pool of the same tokens", "other tokens"


def rows(marks: str = "") -> list[dict[str, Any]]:
    """Alpaca rows with further columns of every kind."""
    more = {"w": 2.0, "v": 3.0, "tokens": [0.5, 1.0], "task": "a", "rules": "Be brief.", "before": [["q", "r"]]}
    return [{"instruction": f"{marks}{i}", "input": "", "output": f"{i}", **more} for i in range(6)]


def messages() -> list[dict[str, Any]]:
    call = '{"name": "f", "arguments": {}}'
    turns = ["human", "one", "gpt", "two", "observation", "three", "function_call", call]
    row = [{"from": role, "value": text} for role, text in zip(turns[::2], turns[1::2], strict=True)]
    return [{"conversations": row, "other": row, "system": "Be brief."}] * 3


@dataclass
class Given:
    """What a load depends on; a row of a table changes one of it."""

    content: Any = field(default_factory=rows)
    name: str = "x"
    file: str = "x.json"
    entry: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    weighting: dict[str, Any] = field(default_factory=dict)
    stage: str = "sft"
    seed: int = 1
    tokenizer: Callable[[], Any] = byte_tokenizer
    kept: str | None = None
    version: str = source.FORMAT_VERSION


def splitting() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = True
    return tokenizer


def with_token() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<one>"]})
    return tokenizer


def with_other_roles() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.eos_token, tokenizer.bos_token
    return tokenizer


# What changes of `Given`, and what that makes of the usual pool.
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, SAME),
    "a character": ({"content": rows("!")}, TOKENS),
    "the file's name alone": ({"file": "y.json"}, SAME),
    "the dataset's name alone": ({"name": "z"}, POOL),
    "the version": ({"version": "x"}, TOKENS),
    "the stage": ({"stage": "pt", "data": {"packing": False}}, TOKENS),
    "the seed": ({"seed": 2}, SAME),
    "the seed of a draw": ({"seed": 2, "entry": {"num_samples": 4}}, TOKENS),
    "special tokens that are split": ({"tokenizer": splitting}, TOKENS),
    "special tokens in each other's place": ({"tokenizer": with_other_roles}, TOKENS),
    "another special token": ({"tokenizer": with_token}, TOKENS),
    "a kept column": ({"kept": "task", "data": {"val_size": 0.5}}, TOKENS),
}
# Of each key of the data section: a change of it, and what that makes of the usual pool.
DATA: dict[str, tuple[Any, str]] = {
    "dataset": (("x", "other"), POOL),
    "eval_dataset": (("other",), SAME),
    "dataset_dir": (None, SAME),  # the same files in another place: test_cache.py
    "template": ("alpaca", TOKENS),
    "cutoff_len": (9, TOKENS),
    "max_samples": (3, TOKENS),
    "train_on_prompt": (True, TOKENS),
    "mask_history": (True, TOKENS),
    "val_size": (0.5, POOL),
    "subtask_column": ("task", SAME),  # what is kept is said by the caller: CHANGES
    "packing": (True, SAME),
    "neat_packing": (True, SAME),
    "streaming": (None, SAME),  # another way of reading: test_stream_identity.py
    "buffer_size": (7, SAME),
    "tokenized_path": (None, SAME),  # test_cache.py
    "overwrite_cache": (True, TOKENS),
    "preprocessing_num_workers": (2, SAME),
    "dataloader_num_workers": (2, SAME),
    "sample_weight": ("w", TOKENS),
    "default_system": ("Be brief.", TOKENS),
    "enable_thinking": (False, SAME),  # this template has no thoughts
}
WEIGHTING: dict[str, tuple[Any, str]] = {
    "sample_weight_as": ("both", SAME),
    "domain_weights": ({"x": 2.0}, SAME),
    "class_weights": ({"5": 2.0}, SAME),
    "role_weights": ({"prompt": 0.5}, TOKENS),
    "turn_weights": ((0.5, 1.0), TOKENS),
    "token_weight": ("tokens", TOKENS),
    "token_weight_spans": ({"1": (None, 0.5)}, TOKENS),
    "sampling": ("inverse_domain", SAME),
    "sampling_temperature": (0.25, SAME),
    "sampling_replacement": (True, SAME),
    "sampling_samples": (4, SAME),
    "sampling_correction": (True, SAME),
}
ALIKE = {"overwrite_cache"}  # made anew, and the same


class Loader:
    """Loads into one cache, and counts the rows that are tokenised."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch, self.tokenised = folder, patch, 0
        batch = Encoder.batch

        def counted(encoder: Encoder, given: dict[str, list[Any]]) -> dict[str, list[Any]]:
            self.tokenised += len(given["turns"])
            return batch(encoder, given)

        patch.setattr(Encoder, "batch", counted)

    def load(self, given: Given) -> tuple[str, int]:
        """The training pool's fingerprint, and how many rows were tokenised for all pools."""
        self.patch.setattr(source, "FORMAT_VERSION", given.version)
        source._digest.cache_clear()
        self.folder.mkdir(exist_ok=True)
        entries = {given.name: {"file_name": given.file, **given.entry}, "other": {"file_name": "other.json"}}
        (self.folder / given.file).write_text(json.dumps(given.content))
        (self.folder / "other.json").write_text(json.dumps(ROWS))
        (self.folder / "dataset_info.json").write_text(json.dumps(entries))
        keys = {"dataset": (given.name,), "dataset_dir": str(self.folder), "template": "default", "cutoff_len": 512}
        config = Config(
            data=DataSection(**{**keys, **given.data}),
            method=MethodSection(stage=given.stage),
            train=TrainSection(seed=given.seed),
            weighting=WeightingSection(**given.weighting),
        )
        before = self.tokenised
        pool = load_data(config, given.tokenizer(), given.kept).train
        return pool.fingerprint, self.tokenised - before


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    made = Loader(tmp_path / "data", monkeypatch)
    made.load(Given(data={"dataset": ("x", "other")}))  # the usual tokens, and those of the other dataset
    return made


def check(loader: Loader, case: str, given: Given, effect: str) -> None:
    usual, none = loader.load(Given())
    assert none == 0
    fingerprint, tokenised = loader.load(given)
    assert (tokenised > 0) == (effect == TOKENS), f"{case}: tokenised {tokenised} rows"
    assert (fingerprint == usual) == (effect == SAME or case in ALIKE), case
    if case not in ALIKE:
        assert loader.load(given) == (fingerprint, 0), f"{case}: made twice"


@pytest.mark.parametrize("case", CHANGES)
def test_one_change(loader: Loader, case: str) -> None:
    changes, effect = CHANGES[case]
    check(loader, case, replace(Given(), **changes), effect)


def test_keys_of_the_data_section(loader: Loader) -> None:
    assert set(DATA) == set(DataSection.model_fields), "add a row to DATA"
    for key, (value, effect) in DATA.items():
        if value is not None:
            check(loader, key, Given(data={key: value}), effect)


def test_keys_of_the_weighting_section(loader: Loader) -> None:
    assert set(WEIGHTING) == set(WeightingSection.model_fields), "add a row to WEIGHTING"
    for key, (value, effect) in WEIGHTING.items():
        check(loader, key, Given(weighting={key: value}), effect)


def test_a_template_of_a_file_counts_by_what_it_says(loader: Loader, tmp_path: Path) -> None:
    """Its text decides, and the tool format that it names; its name and its file's do not."""

    def load(name: str, user: str, more: str = "", call: str = "x") -> tuple[str, int]:
        lines = [f"templates: {{{name}: {{user: {json.dumps(user)}, tools: own{more}}}}}"]
        lines.append(f"tool_formats: {{own: {{described: y, called: {call}}}}}")
        (tmp_path / f"{name}.yaml").write_text("\n".join(lines))
        return loader.load(Given(data={"template": f"{tmp_path / name}.yaml#{name}"}))

    first = load("a", "Q: {content} A:")
    assert first[1] == 6 and load("a", "Q: {content} A:") == load("b", "Q: {content} A:") == (first[0], 0)
    others = [load("a", "Q: {content} B:"), load("a", "Q: {content} A:", ", after: z")]
    others.append(load("a", "Q: {content} A:", call="z"))
    assert [count for _, count in others] == [6, 6, 6] and len({first[0], *(print for print, _ in others)}) == 4


def test_weights_of_samples_in_a_file(loader: Loader, tmp_path: Path) -> None:
    """They are of the pool and not of the tokens."""
    for number in (1.0, 2.0):
        np.save(tmp_path / f"{number}.npy", np.full(6, number))
    found = [loader.load(Given(data={"sample_weight": str(tmp_path / f"{n}.npy")})) for n in (1.0, 2.0, 1.0)]
    assert [count for _, count in found] == [0, 0, 0]
    assert found[0] == found[2] != found[1] != loader.load(Given())


# Of each field of a dataset's entry and of its columns and tags: what the entry says, and over which rows.
ENTRY: dict[str, Any] = {
    "name": None, "where": None, "path": None, "hub_id": None, "subset": None, "split": None, "folder": None,
    "formatting": {"formatting": "openai", "columns": {"messages": "conversations"}, "tags": {
        "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
        "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"}},
    "num_samples": {"num_samples": 2},
    "columns": None, "tags": None,
}  # fmt: skip
COLUMNS: dict[str, tuple[str, str] | None] = {
    "prompt": ("alpaca", "output"),
    "query": ("alpaca", "output"),
    "response": ("alpaca", "instruction"),
    "history": ("alpaca", "before"),
    "messages": ("sharegpt", "other"),
    "system": ("alpaca", "rules"),
    "tools": ("alpaca", "rules"),
    "given": None,
}
TAGS = {
    "role_tag": "value",
    "content_tag": "from",
    "user_tag": "gpt1",
    "assistant_tag": "gpt2",
    "observation_tag": "human2",
    "function_tag": "call",
    "system_tag": "rules",
}


def parts_of(formatting: str = "alpaca", columns: dict[str, str] = {}, tags: dict[str, str] = {}) -> str:  # noqa: B006
    """The fingerprint of how rows become turns."""
    info = DatasetInfo(
        "x", "x", Path("x"), formatting=formatting, columns=replace(Columns(), **columns), tags=Tags(**tags)
    )
    return source.fingerprint_of(source.conversion_parts(source.Converter(info, "sft")))


def test_fields_of_a_datasets_entry(loader: Loader) -> None:
    assert set(ENTRY) == {f.name for f in fields(DatasetInfo)}, "add a row to ENTRY"
    assert set(COLUMNS) == {f.name for f in fields(Columns)} and set(TAGS) == {f.name for f in fields(Tags)}
    alpaca, sharegpt = parts_of(), parts_of("sharegpt")
    seen = [alpaca, sharegpt]
    seen += [parts_of(row[0], {key: row[1]}) for key, row in COLUMNS.items() if row is not None]
    seen += [parts_of("sharegpt", tags={key: value}) for key, value in TAGS.items()]
    assert len(set(seen)) == len(seen)
    usual = Given(messages(), entry={"formatting": "sharegpt"})
    first = loader.load(usual)
    assert first[1] > 0 and loader.load(usual) == (first[0], 0)
    for entry in filter(None, ENTRY.values()):
        fingerprint, tokenised = loader.load(replace(usual, entry=usual.entry | entry))
        assert tokenised > 0 and fingerprint != first[0]


@pytest.mark.parametrize("cls", [Settings, TokenWeights])
def test_every_field_of_the_settings_counts(cls: Any) -> None:
    """Each field with a value that is not its default changes the parts that the fingerprint is made of."""
    usual = {"stage": "sft", "cutoff_len": 5} if cls is Settings else {}
    others: dict[str, Any] = {"stage": "pt", "cutoff_len": 6, "token_weights": TokenWeights(), "column": "c"}
    others |= {"prompt": 0.5, "answer": 0.5, "turns": (2.0,), "spans": (("a", None, 2.0),)}
    first = json.dumps(cls(**usual).parts())
    for each in fields(cls):
        changed = cls(**{**usual, each.name: others.get(each.name, True)})
        assert json.dumps(changed.parts()) != first, each.name


def test_a_tokenizer_is_known_by_what_it_makes_of_text() -> None:
    usual = tokenizer_identity(byte_tokenizer())
    assert usual == tokenizer_identity(byte_tokenizer())
    others = {tokenizer_identity(make()) for make in (splitting, with_token, with_other_roles)}
    assert len({usual, *others}) == 4


def test_a_pool_of_objects_is_known_by_its_samples() -> None:
    samples: list[dict[str, Any]] = tiny.samples(4, seed=1)
    usual = Pool.from_datasets(samples).fingerprint
    assert usual == Pool.from_datasets([dict(s) for s in samples]).fingerprint
    ids, labels = samples[0]["input_ids"], samples[0]["labels"]
    changed = {
        "ids": [{"input_ids": [*ids[:-1], 3], "labels": labels}, *samples[1:]],
        "labels": [{"input_ids": ids, "labels": [*labels[:-1], -100]}, *samples[1:]],
        "order": samples[::-1],
        "fewer": samples[:-1],
        "weights": [s | {"sample_weight": 2.0} for s in samples],
        "token weights": [s | {"token_weight": [1.0] * len(s["input_ids"])} for s in samples],
        "name": {"other": samples},
    }
    assert len({usual, *(Pool.from_datasets(made).fingerprint for made in changed.values())}) == 1 + len(changed)
