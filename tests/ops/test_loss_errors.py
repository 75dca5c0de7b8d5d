"""Every argument that does not fit is a ValueError that says what was expected and what was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dataflex.ops import linear_per_sample_loss, loss_and_head_sketch, merge_vocab_shards, per_sample_loss
from dataflex.ops.losses.loss_native import native_ops

LOGITS, LABELS, CU = torch.zeros(6, 3), torch.zeros(6, dtype=torch.int64), torch.tensor([0, 6])
HIDDEN, WEIGHT = torch.zeros(6, 4), torch.zeros(3, 4)
META = torch.zeros(6, dtype=torch.int64, device="meta")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing: expected 0 <= label_smoothing < 1, got 1.0"),
        ({"label_smoothing": float("nan")}, r"label_smoothing: expected 0 <= label_smoothing < 1, got nan"),
        ({"z_loss": -1.0}, r"z_loss: expected a finite number >= 0, got -1.0"),
        ({"softcap": float("inf")}, r"softcap: expected a finite number >= 0, got inf"),
        ({"token_weight": torch.ones(5)}, r"token_weight: expected floats \[6\], got torch.float32 \(5,\)"),
        ({"token_weight": LABELS}, r"token_weight: expected floats \[6\], got torch.int64 \(6,\)"),
        ({"class_weight": torch.ones(3, 1)}, r"class_weight: expected floats \[3\], got torch.float32 \(3, 1\)"),
        ({"class_weight": torch.ones(3, device="meta")}, r"class_weight: expected on cpu like logits, got meta"),
        ({"vocab_offset": -1}, r"vocab_offset: expected >= 0, got -1"),
        ({"vocab_offset": 0, "z_loss": 0.1}, r"vocab_offset: expected no label_smoothing and no z_loss on a shard"),
        ({"vocab_offset": 0, "token_weight": torch.ones(6)}, r"vocab_offset: expected no weights on a shard"),
    ],
)
def test_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        per_sample_loss(LOGITS, LABELS, CU, **options)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((LOGITS.int(), LABELS, CU), r"logits: expected float32, bfloat16, float16 or float64, got torch.int32"),
        ((LOGITS[:, :0], LABELS, CU), r"logits: expected a vocabulary of at least 1, got 0"),
        ((LOGITS, META, CU), r"labels: expected on cpu like logits, got meta"),
        ((LOGITS, LABELS, CU.to("meta")), r"cu_seqlens: expected on cpu like logits, got meta"),
    ],
)
def test_tensors(arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        per_sample_loss(*arguments)


def test_a_shard_takes_labels_of_the_whole_vocabulary_but_no_negative_ones() -> None:
    got = per_sample_loss(LOGITS, LABELS + 7, CU, vocab_offset=0)
    assert torch.equal(got.token_loss, got.lse)
    with pytest.raises(ValueError, match="labels: expected at least 0 or -100, got -1"):
        per_sample_loss(LOGITS, LABELS - 1, CU, vocab_offset=0)


@pytest.mark.parametrize(
    ("head", "more", "text"),
    [
        ((HIDDEN[0], WEIGHT), {}, r"hidden: expected \[N, H\], got \(4,\)"),
        ((HIDDEN, WEIGHT.T), {}, r"weight: expected \[V, 4\], got \(4, 3\)"),
        ((HIDDEN, WEIGHT.double()), {}, r"weight: expected torch.float32 on cpu like hidden, got torch.float64 on cpu"),
        ((HIDDEN, WEIGHT), {"bias": torch.zeros(4)}, r"bias: expected \[3\], got \(4,\)"),
        ((HIDDEN, WEIGHT), {"chunk_tokens": 0}, r"chunk_tokens: expected at least 1, got 0"),
    ],
)
def test_linear_heads(head: tuple[torch.Tensor, torch.Tensor], more: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        linear_per_sample_loss(*head, LABELS, CU, **more)
    with pytest.raises(ValueError, match=text):
        where = {"k1": 4, "seed": 0, "tensor_id": 0}
        loss_and_head_sketch(head[0], LABELS, CU, weight=head[1], **where, **more)


@pytest.mark.parametrize("k1", [0, 1, 3, 100])
def test_a_sketch_is_a_power_of_two(k1: int) -> None:
    with pytest.raises(ValueError, match=f"k1: expected a power of two >= 2, got {k1}"):
        loss_and_head_sketch(LOGITS, LABELS, CU, k1=k1, seed=0, tensor_id=0)


def test_a_sketch_without_a_head_takes_no_bias() -> None:
    with pytest.raises(ValueError, match="bias: expected none without weight"):
        loss_and_head_sketch(LOGITS, LABELS, CU, k1=4, seed=0, tensor_id=0, bias=torch.zeros(3))


def test_shards_have_the_same_tokens() -> None:
    with pytest.raises(ValueError, match="shards: expected at least one, got none"):
        merge_vocab_shards([], LABELS, CU)
    whole = per_sample_loss(LOGITS, LABELS, CU, vocab_offset=0)
    half = per_sample_loss(LOGITS[:3], LABELS[:3], torch.tensor([0, 3]), vocab_offset=3)
    with pytest.raises(ValueError, match=r"shards: expected the same tokens in all, got \[6, 3\]"):
        merge_vocab_shards([whole, half], LABELS, CU)


def test_logits_overwritten_by_their_gradient_cannot_be_used_again() -> None:
    logits = torch.randn(6, 3, requires_grad=True) * 1
    if native_ops(logits) is None:
        pytest.skip("the portable reference keeps its logits")
    loss = per_sample_loss(logits, LABELS, CU, inplace_backward=True).loss.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
