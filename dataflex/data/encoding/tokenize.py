"""Turns become token ids and labels, once: `datasets` caches the result under our own fingerprint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex.data.encoding.encode import IdPair, digest_of, encode_pairs, tokenizer_identity, trained_count
from dataflex.data.encoding.rounds import Pair, Pieces
from dataflex.data.encoding.template import Template, get_template
from dataflex.data.encoding.token_weights import TokenWeights
from dataflex.data.sources.source import cached_dataset, fingerprint_of
from dataflex.utils.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, Features

    from dataflex.config import Config

Batch = dict[str, list[Any]]
ROWS_PER_PROCESS = 500


@dataclass(frozen=True)
class Settings:
    """What decides the ids and labels of a row, besides the tokenizer and the template."""

    stage: str
    cutoff_len: int
    train_on_prompt: bool = False
    mask_history: bool = False
    packed_blocks: bool = False
    token_weights: TokenWeights | None = None

    def parts(self) -> list[Any]:
        weights = [] if self.token_weights is None else [self.token_weights.parts()]
        return [self.stage, self.cutoff_len, self.train_on_prompt, self.mask_history, self.packed_blocks, *weights]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with a template (None in stage pt) and settings: rows in, columns out."""

    tokenizer: Any
    template: Template | None
    settings: Settings

    def __post_init__(self) -> None:
        if self.settings.train_on_prompt and self.template is not None and self.template.ends_with_eos:
            raise UserError(
                "train_on_prompt: not with this template: the end of an answer is the label of the next prompt's first "
                "token there"
            )

    @classmethod
    def of(cls, cfg: Config, tokenizer: Any, tokens: TokenWeights | None) -> Encoder:
        """As ``cfg`` says. tokens: the weights of tokens, where they are asked for."""
        stage, data = cfg.method.stage, cfg.data
        given = (data.template, tokenizer, data.enable_thinking, data.default_system)
        template = None if stage == "pt" else get_template(*given)
        packed = stage == "pt" and cfg.packs
        settings = Settings(stage, data.cutoff_len, data.train_on_prompt, data.mask_history, packed, tokens)
        return cls(tokenizer, template, settings)

    def identity(self) -> list[Any]:
        """What the fingerprint of a tokenised dataset covers besides its rows."""
        template = self.template.identity if self.template is not None else ""
        return [tokenizer_identity(self.tokenizer), template, *self.settings.parts()]

    def batch(self, rows: Batch) -> Batch:
        """Tokenise a batch of the rows of `read_source` (all without a problem)."""
        if self.settings.stage == "pt":
            return _columns(self._documents([turns[0]["content"] for turns in rows["turns"]]), rows)
        samples, weights = self._conversations(rows)
        columns = _columns(samples, rows)
        return columns if self.settings.token_weights is None else columns | {"token_weight": weights}

    def _conversations(self, rows: Batch) -> tuple[list[tuple[list[int], list[int], bool]], list[list[float]]]:
        """Samples, and the weights of their tokens where these are asked for."""
        assert self.template is not None
        settings, template = self.settings, self.template
        pairs = [
            template.pairs([(t["role"], t["content"]) for t in turns], where, settings.mask_history)
            for turns, where in zip(rows["turns"], rows["where"], strict=True)
        ]
        id_pairs = self._id_pairs(pairs)
        end = self.tokenizer.eos_token_id if template.ends_with_eos else None
        samples = [self._joined(row, end, settings.train_on_prompt) for row in id_pairs]
        return samples, [] if settings.token_weights is None else self._token_weights(rows, pairs, id_pairs)

    def _id_pairs(self, pairs: list[list[Pair]]) -> list[list[IdPair]]:
        """The ids of each pair, every piece tokenised by itself."""
        ids = iter(self._tokenise([piece for row in pairs for pair in row for part in pair for piece in part]))

        def joined(pieces: Pieces) -> list[int]:
            return [token for _ in pieces for token in next(ids)]

        return [[(joined(prompt), joined(answer)) for prompt, answer in row] for row in pairs]

    def _joined(self, pairs: Any, end: Any, train_on_prompt: bool = False) -> tuple[Any, Any, bool]:
        """`encode_pairs` as the settings and the template ask for; also of weights in place of ids."""
        settings = self.settings
        return encode_pairs(pairs, settings.cutoff_len, train_on_prompt, settings.mask_history, self._after, end)

    @cached_property
    def _after(self) -> int:
        """Tokens that stand between an answer and the next turn."""
        assert self.template is not None
        return sum(map(len, self._tokenise(list(self.template.after))))

    def _token_weights(self, rows: Batch, pairs: list[list[Pair]], id_pairs: list[list[IdPair]]) -> list[list[float]]:
        """The weight of each token of each row, cut as the ids are."""
        settings, template = self.settings, self.template
        assert settings.token_weights is not None and template is not None
        places = iter(self._places([answer for row in pairs for _, answer in row]))
        columns = rows["token_weight"] if settings.token_weights.column else [None] * len(pairs)
        made = []
        for texts, ids, column, where in zip(pairs, id_pairs, columns, rows["where"], strict=True):
            lengths = [(len(prompt), len(answer)) for prompt, answer in ids]
            answers = [("".join(answer), next(places)) for _, answer in texts]
            weights = settings.token_weights.of_pairs(lengths, answers, column, where)
            ends = [settings.token_weights.of_answer(turn, len(lengths)) for turn in range(len(lengths))]
            if template.ends_with_eos:
                for turn, (prompt, _) in enumerate(weights[1:]):
                    prompt[:1] = ends[turn : turn + len(prompt[:1])]
            made.append(self._joined(weights, ends[-1] if template.ends_with_eos else None)[0])
        return made

    def _places(self, answers: list[Pieces]) -> list[Any]:
        """(first, end) characters of each token of each answer, where spans ask for them; else None."""
        assert self.settings.token_weights is not None
        if not self.settings.token_weights.spans:
            return [None] * len(answers)
        if not self.tokenizer.is_fast:
            raise UserError("token_weight_spans: needs a fast tokenizer, which knows where its tokens lie in the text")
        encoded = self.tokenizer(
            [piece for answer in answers for piece in answer],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        offsets = iter(encoded["offset_mapping"])
        made = []
        for answer in answers:
            places, before = [], 0
            for piece in answer:
                places += [(before + first, before + end) for first, end in next(offsets)]
                before += len(piece)
            made.append(places)
        return made

    def _documents(self, texts: list[str]) -> list[tuple[list[int], list[int], bool]]:
        """Each document with the end token after it, and the start token where the tokenizer adds one."""
        tokenizer, cutoff = self.tokenizer, self.settings.cutoff_len
        if tokenizer.eos_token_id is None:
            raise UserError("stage pt ends each document with the tokenizer's eos token, but it has none")
        starts = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        start = [tokenizer.bos_token_id] if starts and tokenizer.bos_token_id is not None else []
        samples = []
        for ids in self._tokenise(texts):
            ids = start + ids + [tokenizer.eos_token_id]
            cut = not self.settings.packed_blocks and len(ids) > cutoff
            ids = ids[:cutoff] if cut else ids
            samples.append((ids, ids, cut))
        return samples

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return [list(ids) for ids in encoded]


def tokenise(source: Dataset, encoder: Encoder, name: str, workers: int | None, folder: Path) -> Dataset:
    """The tokenised rows of ``source``: see `sample_features`. Their files are written into ``folder``.

    ``workers`` processes share the rows (fewer where there are few rows).
    """
    processes = min(workers or 1, max(1, len(source) // ROWS_PER_PROCESS))
    return source.map(
        encoder.batch,
        batched=True,
        num_proc=processes if processes > 1 else None,
        remove_columns=source.column_names,
        features=sample_features(encoder.settings.token_weights is not None),
        cache_file_name=str(folder / "tokens.arrow"),
        new_fingerprint=fingerprint_of("tokens of", source._fingerprint),
        desc=f"Tokenising {name}",
    )


def sample_features(token_weight: bool = False) -> Features:
    """input_ids and labels (int32), length, trained (tokens that count), truncated, digest, weights, kept."""
    from datasets import Features, List, Value

    return Features(
        {
            "input_ids": List(Value("int32")),
            "labels": List(Value("int32")),
            "length": Value("int32"),
            "trained": Value("int32"),
            "truncated": Value("bool"),
            "digest": Value("int64"),
            "sample_weight": Value("float32"),
            "kept": Value("string"),
        }
        | ({"token_weight": List(Value("float32"))} if token_weight else {})
    )


def pack_blocks(documents: Dataset, cutoff_len: int, fingerprint: str) -> Dataset:
    """The documents one after another, cut into blocks of ``cutoff_len``; the last one may be shorter."""
    return cached_dataset(
        partial(_blocks, documents, cutoff_len), sample_features(), fingerprint_of("blocks", fingerprint)
    )


def cut_blocks(ids: np.ndarray, cutoff_len: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Whole blocks of ``cutoff_len`` tokens, int32, and the tokens that are left. ids: int32 [n]."""
    whole = len(ids) // cutoff_len * cutoff_len
    return [ids[start : start + cutoff_len] for start in range(0, whole, cutoff_len)], ids[whole:]


def _blocks(documents: Dataset, cutoff_len: int) -> Iterator[dict[str, Any]]:
    rest = np.empty(0, dtype=np.int32)
    for table in documents.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=256):
        ids = table["input_ids"].combine_chunks().flatten().to_numpy()
        blocks, rest = cut_blocks(np.concatenate([rest, ids]), cutoff_len)
        yield from map(_block, blocks)
    if len(rest):
        yield _block(rest)


def _block(ids: np.ndarray) -> dict[str, Any]:
    return {
        "input_ids": ids,
        "labels": ids,
        "length": len(ids),
        "trained": len(ids) - 1,
        "truncated": False,
        "digest": digest_of(ids, ids),
        "sample_weight": 1.0,
        "kept": "",
    }


def _columns(samples: list[tuple[list[int], list[int], bool]], rows: Batch) -> Batch:
    return {
        "input_ids": [ids for ids, _, _ in samples],
        "labels": [labels for _, labels, _ in samples],
        "length": [len(ids) for ids, _, _ in samples],
        "trained": [trained_count(labels) for _, labels, _ in samples],
        "truncated": [cut for _, _, cut in samples],
        "digest": [digest_of(ids, labels) for ids, labels, _ in samples],
        "sample_weight": rows["weight"],
        "kept": rows["kept"],
    }
