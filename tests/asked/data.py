"""Rows whose fact is on the data: what was read, how it was tokenised, and how it is collated. In one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from transformers import AutoTokenizer

from dataflex.data import load
from dataflex.driver import setup
from dataflex.engine.models.model import load_tokenizer
from dataflex.train.trainer.build import packing_of, pass_rows
from tests.asked.table import Build, Built, Row


def read(build: Build, workspace: Path) -> Built:
    """The data of a build; ``engine`` is what tokenising it was called with."""
    cfg = build.config(workspace)
    called: dict[str, Any] = {}

    def tokenise(rows: Any, encoder: Any, name: str, workers: int | None, folder: Path) -> Any:
        called["workers"] = workers
        return made(rows, encoder, name, workers, folder)

    def cached(fingerprint: str, make: Any, overwrite: bool = False) -> Any:
        called["overwrite"] = overwrite
        return kept(fingerprint, make, overwrite=overwrite)

    made, kept = load.tokenise, load.cached

    def loaded(source: str, **options: Any) -> Any:
        called["hub"] = options
        return read_it(source, **options)

    read_it = AutoTokenizer.from_pretrained
    with mock.patch.object(AutoTokenizer, "from_pretrained", loaded):
        tokenizer = load_tokenizer(cfg)
    with mock.patch.object(load, "tokenise", tokenise), mock.patch.object(load, "cached", cached):
        data = load.load_data(cfg, tokenizer)
    inputs = setup.Inputs(cfg, tokenizer, None, data, None, None)  # type: ignore[arg-type]
    return Built(cfg, workspace, called, inputs)


def pool(b: Built) -> Any:
    return b.inputs.data.train


def text(b: Built, index: int = 0, part: str = "input_ids") -> str:
    """A sample's tokens as text; of the labels only those that are trained."""
    return str(b.inputs.tokenizer.decode([token for token in pool(b)[index][part] if token >= 0]))


def collated(b: Built) -> list[Any]:
    """Rows of a batch of the first two samples, and the positions of their first tokens."""
    batch = setup._collator(b.cfg, b.inputs.tokenizer)([pool(b)[0], pool(b)[1]])
    starts = [] if "position_ids" not in batch else (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    return [len(batch["input_ids"]), starts]


def packed(b: Built) -> list[Any]:
    """`collated`, and how many packs a pass over the pool is."""
    packing = packing_of(b.cfg, pool(b))
    assert packing is not None
    return [*collated(b), packing.pool.rows]


ONE = "Human: Say 0</s>\nAssistant:aaa</s>"
OTHER = {"dataset_dir": "data2", "template": "default"}
TEXT = Build(
    "text",
    (
        Row("dataset_dir", "data2", lambda b: pool(b).domain_names, ["short"]),
        Row("dataset", ["short"], lambda b: pool(b).domain_names, ["short"]),
        Row("template", "default", text, ONE),
        Row("cutoff_len", 31, lambda b: pool(b).lengths.tolist(), [28, 30, 30]),
        Row("max_samples", 3, lambda b: len(pool(b)), 3),
        Row("train_on_prompt", True, lambda b: text(b, part="labels"), ONE),
        Row("preprocessing_num_workers", 3, lambda b: b.engine["workers"], 3),
        Row("overwrite_cache", True, lambda b: b.engine["overwrite"], True),
        Row("model_revision", "v2", lambda b: b.engine["hub"]["revision"], "v2"),
        Row("cache_dir", "hub", lambda b: b.engine["hub"]["cache_dir"], "hub"),
    ),
)
# Tokens of the two answers are b c end, e f g end; the column has 1 to 7 for them; f to g counts three times.
TOKEN_WEIGHTS = [1 / 8, 2 / 8, 3 / 8, 4.0, 15.0, 18.0, 7.0]


def answers(b: Built) -> list[float]:
    """The weights of the tokens of the first sample's answers; those of its prompts are all 1."""
    weights = [1.0 if place else w for w, place in zip(pool(b)[0]["token_weight"], _answered(b), strict=True)]
    assert set(weights) == {1.0}
    return [w for w, place in zip(pool(b)[0]["token_weight"], _answered(b), strict=True) if place]


def _answered(b: Built) -> list[bool]:
    """Which tokens of the first sample are of an answer, by the text that the template makes."""
    whole = "".join(p + a for p, a in PAIRS)
    marks = [inside for p, a in PAIRS for part, inside in ((p, False), (a, True)) for _ in _tokens(part)]
    assert text(b) == whole
    return marks


def _tokens(part: str) -> list[str]:
    return list(part.replace("</s>", "E"))


PAIRS = [("Human: a</s>\nAssistant:", "bc</s>"), ("\nHuman: d</s>\nAssistant:", "efg</s>")]
TURNS = Build(
    "turns",
    (
        Row("mask_history", True, lambda b: text(b, part="labels"), "efg</s>"),
        Row("role_weights", {"answer": 0.5}, answers, TOKEN_WEIGHTS),
        Row("turn_weights", [0.25, 2], answers, TOKEN_WEIGHTS),
        Row("token_weight", "w", answers, TOKEN_WEIGHTS),
        Row("token_weight_spans", {"f": ["g", 3]}, answers, TOKEN_WEIGHTS),
        Row("val_size", 2, lambda b: [len(pool(b)), len(b.inputs.data.eval)], [3, 2]),
        Row(
            "tokenized_path", "tokens", lambda b: sorted(p.name for p in (b.workspace / "tokens").iterdir()), ["turns"]
        ),
    ),
    {**OTHER, "dataset": ["turns"]},
)
BLOCKS = Build(
    "blocks",
    (
        Row(
            "stage",
            "pt",
            lambda b: [pool(b).lengths[:2].tolist(), text(b, part="labels")],
            [[16, 16], "doc 0</s>doc 1</s>doc "],
        ),
    ),
    {"dataset_dir": "data2", "dataset": ["docs"], "cutoff_len": 16},
)
UNPACKED = Build(
    "unpacked",
    (Row("packing", False, lambda b: [text(b, 0), text(b, 1)], ["doc 0</s>", "doc 1</s>"]),),
    {"dataset_dir": "data2", "dataset": ["docs"], "stage": "pt"},
)
PACKED = Build(
    "packed", (Row("packing", True, packed, [1, [0, 28], 4]),), {**OTHER, "dataset": ["short"], "cutoff_len": 64}
)
NEAT = Build(
    "neat", (Row("neat_packing", True, packed, [1, [0, 28], 4]),), {**OTHER, "dataset": ["short"], "cutoff_len": 64}
)
QUIET = Build(
    "quiet",
    (
        Row("enable_thinking", False, lambda b: text(b, part="labels"), "aaa<|im_end|>"),
        Row(
            "default_system",
            "Be brief.",
            lambda b: text(b).partition("<|im_start|>user")[0],
            "<|im_start|>system\nBe brief.<|im_end|>\n",
        ),
    ),
    {"dataset_dir": "data2", "dataset": ["short"], "template": "qwen3"},
)
# Of 6 and of 5 samples in turn, until the 5 are used up.
INTERLEAVED = Build(
    "interleaved",
    (
        Row(
            "mix_strategy",
            "interleave_under",
            lambda b: [pass_rows(b.cfg, pool(b), None), b.cfg.flex.train_type, b.cfg.flex.static_mix],
            [10, ["dynamic_mix"], True],
        ),
    ),
    {**OTHER, "dataset": ["short", "turns"]},
)
STREAM = Build(
    "stream",
    (
        Row("streaming", True, lambda b: [type(pool(b)).__name__, pool(b).size], ["StreamPool", None]),
        Row(
            "buffer_size",
            2,
            lambda b: sorted(text(b, i) for i in range(2)),
            [ONE, ONE.replace("0", "1").replace("aaa", "aaaaa")],
        ),
    ),
    {**OTHER, "dataset": ["short"]},
)
BUILDS = (TEXT, TURNS, BLOCKS, UNPACKED, PACKED, NEAT, QUIET, INTERLEAVED, STREAM)
