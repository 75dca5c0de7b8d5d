"""Samples become the tensors of a micro-batch, padded on the right or packed into few rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dataflex.data.encoding.encode import IGNORE_INDEX
from dataflex.utils.errors import UserError

Sample = dict[str, Any]


class Collator:
    """Collates samples with `input_ids` and `labels` (lists or 1-D tensors), in the order given.

    Padded: input_ids, attention_mask and labels, each int64 [B, T], one row per sample.

    Packed: input_ids, labels and position_ids, each int64 [B, T], and cu_seqlens, int64 [S + 1], over the
    flattened B * T tokens: segment s is sample s, and the padding at the end of a row belongs to the row's
    last sample. A row takes samples until the next one does not fit in ``cutoff_len``. position_ids restart
    in each sample and each sample's first label is -100. There is no attention_mask: transformers makes the
    attention block-diagonal from position_ids, but **only with use_cache=False**, and with flash attention
    only for B = 1 (a cutoff_len of micro-batch * the longest sample gives one row). Otherwise it lets
    samples see one another without a word.

    `sample_weight`, where every sample has one, is added as float32 [number of samples], and `token_weight` (one
    number per token, of its own loss) as float32 [B, T], 1 in the padding.

    Args:
        pad_token_id: what fills up input_ids (labels are -100 there).
        packing: whether to pack.
        cutoff_len: the longest row when packing.
        pad_to_multiple_of: rounds T up.
    """

    def __init__(
        self,
        pad_token_id: int,
        packing: bool = False,
        cutoff_len: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if pad_token_id is None:
            raise UserError("the tokenizer has no pad token; set one (its eos token will do)")
        if packing and cutoff_len is None:
            raise UserError("packing: needs cutoff_len, the longest row")
        self.pad_token_id = int(pad_token_id)
        self.packing = packing
        self.cutoff_len = cutoff_len
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        assert len(samples) > 0, "a micro-batch has at least one sample"
        ids = [_tensor(sample["input_ids"]) for sample in samples]
        labels = [_tensor(sample["labels"]) for sample in samples]
        for row_ids, row_labels in zip(ids, labels, strict=True):
            assert row_ids.shape == row_labels.shape and row_ids.dim() == 1, (row_ids.shape, row_labels.shape)
        for sample in samples:
            if not all(sample.get("attention_mask", ())):
                raise UserError("a sample arrives padded (zeros in its attention_mask); the collator pads itself")
        batch = self._pack(ids, labels) if self.packing else self._pad(ids, labels)
        if "token_weight" in samples[0]:
            batch["token_weight"] = self._token_weight(samples, ids, batch["input_ids"].shape[1])
        if all(sample.get("sample_weight") is not None for sample in samples):
            weights = [float(sample["sample_weight"]) for sample in samples]
            batch["sample_weight"] = torch.tensor(weights, dtype=torch.float32)
        return batch

    def _token_weight(self, samples: Sequence[Sample], ids: list[Tensor], width: int) -> Tensor:
        weights = [torch.as_tensor(sample["token_weight"], dtype=torch.float32) for sample in samples]
        for row, weight in zip(ids, weights, strict=True):
            assert row.shape == weight.shape, (row.shape, weight.shape)
        places = self._rows([len(row) for row in ids]) if self.packing else [[s] for s in range(len(ids))]
        return _stack([torch.cat([weights[s] for s in row]) for row in places], width, 1)

    def _width(self, longest: int) -> int:
        multiple = self.pad_to_multiple_of
        return (longest + multiple - 1) // multiple * multiple

    def _pad(self, ids: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
        width = self._width(max(len(row) for row in ids))
        mask = [torch.ones_like(row) for row in ids]
        return {
            "input_ids": _stack(ids, width, self.pad_token_id),
            "attention_mask": _stack(mask, width, 0),
            "labels": _stack(labels, width, IGNORE_INDEX),
        }

    def _pack(self, ids: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
        rows = self._rows([len(row) for row in ids])
        width = self._width(max(sum(len(ids[s]) for s in row) for row in rows))
        all_ids, all_labels, positions, ends = [], [], [], []
        for number, row in enumerate(rows):
            all_ids.append(torch.cat([ids[s] for s in row]))
            all_labels.append(torch.cat([_mask_first(labels[s]) for s in row]))
            lengths = [len(ids[s]) for s in row]
            lengths[-1] += width - sum(lengths)
            positions.append(torch.cat([torch.arange(length) for length in lengths]))
            ends += (torch.tensor(lengths).cumsum(0) + number * width).tolist()
        return {
            "input_ids": _stack(all_ids, width, self.pad_token_id),
            "labels": _stack(all_labels, width, IGNORE_INDEX),
            "position_ids": torch.stack(positions),
            "cu_seqlens": torch.tensor([0, *ends]),
        }

    def _rows(self, lengths: list[int]) -> list[list[int]]:
        """Next fit: sample numbers per row, in order."""
        assert self.cutoff_len is not None
        rows: list[list[int]] = []
        room = -1
        for sample, length in enumerate(lengths):
            if length > self.cutoff_len:
                raise UserError(f"packing: a sample of {length} tokens does not fit in cutoff_len {self.cutoff_len}")
            if not rows or length > room:
                rows.append([])
                room = self.cutoff_len
            rows[-1].append(sample)
            room -= length
        return rows


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int64)


def _mask_first(labels: Tensor) -> Tensor:
    labels = labels.clone()
    labels[:1] = IGNORE_INDEX
    return labels


def _stack(rows: list[Tensor], width: int, fill: int) -> Tensor:
    out = torch.full((len(rows), width), fill, dtype=rows[0].dtype)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out
