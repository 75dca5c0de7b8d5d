"""`StreamPool`: datasets that are read, converted and tokenised as training comes to them (`streaming: true`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dataflex.data.encoding.tokenize import Encoder, cut_blocks
from dataflex.data.pool import TrainingPool, check_ids
from dataflex.data.sources.convert import Converter
from dataflex.data.sources.info import DatasetInfo, find_dataset_dir, read_dataset_infos
from dataflex.data.sources.source import conversion_parts, fingerprint_of
from dataflex.data.streams.stream_rows import Chunks, FileRows, HubRows, Record
from dataflex.data.weight_file import token_weights
from dataflex.utils import dist
from dataflex.utils.errors import UserError

if TYPE_CHECKING:
    from dataflex.config import Config

DOCUMENTS = 64  # are tokenised and packed together


class DomainStream:
    """One dataset as an endless row of samples, one of each usable row; a row is tokenised when it is asked for.

    Positions can be asked for in any order inside the chunk that was read last, and only forwards beyond it.

    Attributes:
        start: the position of the chunk's first sample.
        size: samples of the first pass; 0 until it is over.
    """

    def __init__(self, chunks: Chunks, encoder: Encoder) -> None:
        self.chunks, self.encoder = chunks, encoder
        self.start = self.size = 0
        self._rows: list[Record] = []
        self._load()

    @property
    def line(self) -> str:
        """What is said of it on the screen."""
        chunks = self.chunks
        return f"{chunks.info.name}: streamed ({chunks.source.line}), shuffled {chunks.size:,} rows at a time"

    def _load(self) -> None:
        self._rows = next(self.chunks)
        if self.chunks.epoch and not self.size:
            self.size = self.start

    def reach(self, position: int) -> None:
        """Read on until the chunk that holds ``position``."""
        assert position >= self.start, f"position {position} is behind the chunk that begins at {self.start}"
        while not self._holds(position - self.start):
            self.start += self._count()
            self._load()

    def sample(self, position: int) -> dict[str, Any]:
        """`input_ids`, `labels` and, where they are asked for, `token_weight`."""
        self.reach(position)
        return self._item(position - self.start)

    def row(self, position: int) -> str:
        """The file:row of a position in the chunk; "" where a sample is not made from one row."""
        return str(self._rows[position - self.start]["where"])

    def _count(self) -> int:
        """Samples of the chunk."""
        return len(self._rows)

    def _holds(self, offset: int) -> bool:
        return offset < self._count()

    def _item(self, offset: int) -> dict[str, Any]:
        columns = self._encode([self._rows[offset]])
        return {key: columns[key][0] for key in ("input_ids", "labels", "token_weight") if key in columns}

    def _encode(self, rows: list[Record]) -> dict[str, list[Any]]:
        return self.encoder.batch({key: [row[key] for row in rows] for key in rows[0]})

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on from the beginning of the chunk that was read last."""
        return {"chunks": self.chunks.state_dict(), "start": self.start, "size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.chunks.load_state_dict(state["chunks"])
        self.start, self.size = state["start"], state["size"]
        self._load()


class PackedStream(DomainStream):
    """One dataset of stage pt as an endless row of blocks of cutoff_len tokens.

    Its documents are joined in their shuffled order; what is left at the end of a chunk, or of a pass, begins the
    next one's first block.
    """

    def __init__(self, chunks: Chunks, encoder: Encoder) -> None:
        self._rest = np.empty(0, dtype=np.int32)
        super().__init__(chunks, encoder)

    def _load(self) -> None:
        self._before = self._rest
        self._blocks: list[np.ndarray] = []
        self._packed = 0
        super()._load()

    def row(self, position: int) -> str:
        return ""

    def _count(self) -> int:
        return len(self._blocks)

    def _holds(self, offset: int) -> bool:
        """Pack documents of the chunk until the block is whole, or there are none left."""
        while offset >= len(self._blocks) and self._packed < len(self._rows):
            rows = self._rows[self._packed : self._packed + DOCUMENTS]
            ids = [np.array(ids, dtype=np.int32) for ids in self._encode(rows)["input_ids"]]
            blocks, rest = cut_blocks(np.concatenate([self._rest, *ids]), self.encoder.settings.cutoff_len)
            self._blocks += blocks
            self._rest = rest.copy()  # not a view that keeps the documents alive
            self._packed += len(rows)
        return offset < len(self._blocks)

    def _item(self, offset: int) -> dict[str, Any]:
        return {"input_ids": self._blocks[offset], "labels": self._blocks[offset]}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"rest": self._before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rest = np.asarray(state["rest"], dtype=np.int32)
        super().load_state_dict(state)


class StreamPool(TrainingPool):
    """The streams of all domains. A sample id is position in the domain * number of domains + domain.

    Ids of a domain must be asked for in ascending order, as the plans of `StreamMixture` have them; a rank asks for its
    own. Every rank reads all streams: after each global batch `reach` brings them to the same place, so the state is
    the same on every rank, and a row that cannot be read stops all of them at the same step.

    Attributes:
        vocabulary: the model's token ids are below; `check_limits` sets it, since no sample is known before it is read.
    """

    vocabulary: int | None = None

    def __init__(self, streams: list[DomainStream], fingerprint: str) -> None:
        self.streams = streams
        self.domain_names = [stream.chunks.info.name for stream in streams]
        self.fingerprint = fingerprint
        self._settings = streams[0].encoder.settings
        self._lengths: dict[int, int] = {}
        self._rows: dict[int, str] = {}

    def __getitem__(self, index: int | np.integer[Any]) -> dict[str, Any]:
        position, domain = divmod(int(index), len(self.streams))
        sample = self.streams[domain].sample(position)
        self._lengths[int(index)] = len(sample["input_ids"])
        self._rows[int(index)] = self.streams[domain].row(position)
        if self.vocabulary is not None:
            check_ids(sample, self.vocabulary, f"dataset: sample {index} ({self.whence(int(index))})")
        return sample

    def whence(self, index: int) -> str:
        """The file:row that it is made from, of what this rank read for this step; else its dataset."""
        return self._rows.get(index) or super().whence(index)

    @property
    def size(self) -> None:
        return None

    @property
    def sizes(self) -> np.ndarray:
        """Samples of each domain's first pass, int64 [domains]; 0 until it is over."""
        return np.array([stream.size for stream in self.streams], dtype=np.int64)

    @property
    def longest(self) -> int:
        return self._settings.cutoff_len

    @property
    def weighs_tokens(self) -> bool:
        return self._settings.token_weights is not None

    def domains_of(self, ids: Any) -> np.ndarray:
        return np.asarray(ids, dtype=np.int64) % len(self.streams)

    def weight_rows(self, ids: np.ndarray) -> np.ndarray:
        return self.domains_of(ids)

    def trial_ids(self, count: int) -> np.ndarray:
        return np.arange(count)

    def lengths_of(self, ids: np.ndarray) -> np.ndarray:
        return np.array([self._lengths[int(index)] for index in ids], dtype=np.int64)

    def tokens_of(self, batch: Any) -> np.ndarray:
        """A collective: a rank knows the lengths of what it read."""
        tokens = torch.zeros(len(self.streams), dtype=torch.int64)
        for micro in batch.micro_batches:
            for index in micro.sample_ids.tolist():
                tokens[index % len(self.streams)] += self._lengths[index]
        self._lengths.clear()
        self._rows.clear()
        device = batch.micro_batches[0].labels.device
        summed: np.ndarray = dist.all_reduce(tokens.to(device)).cpu().numpy()
        return summed

    def reach(self, ids: np.ndarray) -> None:
        """Read every stream up to the last of the global batch ``ids``."""
        positions, domains = np.divmod(ids, len(self.streams))
        for domain in np.unique(domains):
            self.streams[domain].reach(int(positions[domains == domain].max()))

    def state_dict(self) -> dict[str, Any]:
        return {"streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for stream, saved in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(saved)


def load_streams(cfg: Config, tokenizer: Any) -> StreamPool:
    """Open every dataset of ``cfg.data`` and read its first chunk; a collective.

    Raises UserError naming dataset and row for what cannot be used, here or when it is come to.
    """
    return dist.together(lambda: _streams(cfg, tokenizer))


def _streams(cfg: Config, tokenizer: Any) -> StreamPool:
    encoder = Encoder.of(cfg, tokenizer, token_weights(cfg))
    infos = read_dataset_infos(cfg.data.dataset, find_dataset_dir(cfg.data.dataset_dir, cfg.source))
    kind = PackedStream if encoder.settings.packed_blocks else DomainStream
    chunks = [_chunks(info, cfg, encoder) for info in infos]
    data = cfg.data
    content = [[one.info.name, one.source.parts, conversion_parts(one.source.converter)] for one in chunks]
    fingerprint = fingerprint_of("streams", content, encoder.identity(), data.buffer_size, data.max_samples)
    return StreamPool([kind(one, encoder) for one in chunks], fingerprint)


def _chunks(info: DatasetInfo, cfg: Config, encoder: Encoder) -> Chunks:
    if info.num_samples is not None:
        raise UserError(
            f"{info.where}.num_samples: streaming: true cannot draw among rows that it does not know; drop it, or use "
            "max_samples, which takes the first rows"
        )
    tokens, most, seed = encoder.settings.token_weights, cfg.data.max_samples, cfg.train.order_seed
    converter = Converter(info, encoder.settings.stage, token_column=None if tokens is None else tokens.column)
    source = HubRows(info, converter) if info.path is None else FileRows(info, converter, seed, most is None)
    return Chunks(source, info, seed, cfg.data.buffer_size, most)
