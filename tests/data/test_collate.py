"""Padding and packing, and that packed samples do not see one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dataflex.data.encoding.collate import Collator
from dataflex.utils.errors import UserError
from tests.tiny import tiny_llama


def sample(ids: list[int], masked: int = 1) -> dict[str, Any]:
    return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}


SAMPLES = [sample([5, 6, 7]), sample([8, 9]), sample([10, 11, 12, 13], masked=2)]


def test_padding() -> None:
    batch = Collator(0)(SAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 0, 0], [10, 11, 12, 13]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [-100, 9, -100, -100], [-100, -100, 12, 13]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert Collator(0, pad_to_multiple_of=8)(SAMPLES)["input_ids"].shape == (3, 8)


def test_packing() -> None:
    batch = Collator(0, packing=True, cutoff_len=6)([sample([5, 6, 7], masked=0), *SAMPLES[1:]])
    assert set(batch) == {"input_ids", "labels", "position_ids", "cu_seqlens"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, -100, 12, 13, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 10]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_packing_keeps_the_order_and_uses_the_whole_row() -> None:
    batch = Collator(0, packing=True, cutoff_len=9, pad_to_multiple_of=4)(SAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 0, 0, 0]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 12]
    lengths = [4, 5, 1, 4]
    batch = Collator(0, packing=True, cutoff_len=5)([sample(list(range(1, n + 1))) for n in lengths])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 0], [1, 2, 3, 4, 5], [1, 1, 2, 3, 4]]
    assert batch["cu_seqlens"].tolist() == [0, 5, 10, 11, 15]


def test_weights_and_tensors() -> None:
    rows = [
        {k: torch.tensor(v) for k, v in s.items()} | {"sample_weight": w}
        for s, w in zip(SAMPLES, (1, 2, 0.5), strict=True)
    ]
    batch = Collator(0)(rows)
    assert batch["sample_weight"].tolist() == [1.0, 2.0, 0.5]
    assert batch["sample_weight"].dtype == torch.float32
    assert torch.equal(batch["input_ids"], Collator(0)(SAMPLES)["input_ids"])


def test_errors() -> None:
    with pytest.raises(UserError, match="no pad token"):
        Collator(None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="packing: needs cutoff_len"):
        Collator(0, packing=True)
    with pytest.raises(UserError, match="a sample of 4 tokens does not fit in cutoff_len 3"):
        Collator(0, packing=True, cutoff_len=3)(SAMPLES)
    with pytest.raises(UserError, match="a sample arrives padded"):
        Collator(0)([{**SAMPLES[0], "attention_mask": [1, 1, 0]}])


def per_sample_losses(batch: dict[str, Tensor], **forward: Any) -> list[float]:
    """The summed loss of each sample of a tiny Llama, from a padded or a packed batch."""
    model = tiny_llama(64).eval()
    labels, cu = batch.pop("labels"), batch.pop("cu_seqlens", None)
    with torch.no_grad():
        logits = model(**batch, **forward).logits
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    losses = cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="none", ignore_index=-100)
    if cu is None:
        return losses.view_as(labels).sum(1).tolist()
    assert cu[-1] == labels.numel()
    return [losses[a:b].sum().item() for a, b in zip(cu[:-1], cu[1:], strict=True)]


def random_samples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 20, (12,), generator=generator).tolist()
    return [sample(torch.randint(3, 64, (n,), generator=generator).tolist(), masked=n // 3) for n in lengths]


@pytest.mark.parametrize(("cutoff", "multiple"), [(24, 1), (64, 16), (512, 1)])
def test_packed_losses_equal_unpacked(cutoff: int, multiple: int) -> None:
    samples = random_samples()
    packed = Collator(0, packing=True, cutoff_len=cutoff, pad_to_multiple_of=multiple)(samples)
    assert packed["input_ids"].shape[0] < len(samples)
    expected = per_sample_losses(Collator(0)(samples))
    assert per_sample_losses(packed, use_cache=False) == pytest.approx(expected, abs=1e-5)


def test_the_cache_must_be_off_for_packed_rows() -> None:
    samples = random_samples()
    packed = Collator(0, packing=True, cutoff_len=64)(samples)
    mixed = per_sample_losses(packed, use_cache=True)
    expected = per_sample_losses(Collator(0)(samples))
    assert max(abs(a - b) for a, b in zip(mixed, expected, strict=True)) > 1e-3
