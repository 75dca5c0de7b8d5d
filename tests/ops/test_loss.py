"""per_sample_loss against float64 cross-entropy, sample by sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dataflex.ops import per_sample_loss, shift_labels

SEGMENTS = [
    [0, 1],
    [0, 5, 12, 13],
    [0, 0, 7, 7, 20, 20],
    [0, 3, 3, 6],
    [0, 67],
]


def case(
    tokens: int, vocabulary: int, dtype: torch.dtype, *, masked: float = 0.3, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] of ``dtype`` and labels [N] of which a part is -100."""
    draw = torch.Generator().manual_seed(seed)
    logits = (4.0 * torch.randn(tokens, vocabulary, generator=draw)).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), generator=draw)
    labels[torch.rand(tokens, generator=draw) < masked] = -100
    return logits, labels


def exact(
    logits: torch.Tensor, labels: torch.Tensor, bounds: list[int], reduction: str = "mean"
) -> tuple[torch.Tensor, list[int]]:
    """Losses [S] with gradient and counts in float64, by a loop over samples."""
    losses, counts = [], []
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        kept = labels[a:b] != -100
        total = F.cross_entropy(logits[a:b][kept].double(), labels[a:b][kept], reduction="sum")
        counts.append(int(kept.sum()))
        losses.append(total / max(1, counts[-1]) if reduction == "mean" else total)
    return torch.stack(losses), counts


@pytest.mark.parametrize("bounds", SEGMENTS)
@pytest.mark.parametrize("vocabulary", [2, 3, 259, 4099])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_counts_and_gradients_equal_float64(bounds: list[int], vocabulary: int, reduction: str) -> None:
    logits, labels = case(bounds[-1], vocabulary, torch.float32)
    ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    weights = torch.arange(1.0, len(bounds))
    got = per_sample_loss(ours, labels, torch.tensor(bounds), reduction=reduction)
    want, counts = exact(truth, labels, bounds, reduction)
    assert got.count.tolist() == counts
    assert got.count.dtype is torch.int64 and got.loss.dtype is torch.float32
    torch.testing.assert_close(got.loss.double(), want, rtol=2e-6, atol=2e-6)
    (got.loss * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-5, atol=1e-6)


def test_token_losses_are_those_of_cross_entropy_and_zero_where_masked() -> None:
    logits, labels = case(31, 17, torch.float32)
    token_loss = per_sample_loss(logits, labels, torch.tensor([0, 10, 31])).token_loss
    want = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    torch.testing.assert_close(token_loss, want, rtol=1e-6, atol=1e-6)
    assert (token_loss[labels == -100] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [3, 1031])
def test_half_precision_stays_within_twice_plain_pytorch(dtype: torch.dtype, vocabulary: int) -> None:
    bounds = [0, 9, 40, 41, 64]
    logits, labels = case(bounds[-1], vocabulary, dtype)
    truth = logits.double().requires_grad_()
    want, _ = exact(truth, labels, bounds)
    want.sum().backward()
    ours = logits.clone().requires_grad_()
    got = per_sample_loss(ours, labels, torch.tensor(bounds)).loss
    got.sum().backward()
    plain = logits.clone().requires_grad_()
    plain_losses = torch.stack(
        [F.cross_entropy(plain[a:b], labels[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    ).nan_to_num()
    plain_losses.sum().backward()
    budget = 2 * (plain_losses.double() - want).abs().max() + 1e-5
    assert (got.double() - want).abs().max() <= budget
    assert ours.grad.dtype is dtype
    gradient_budget = 2 * (plain.grad.double().nan_to_num() - truth.grad).abs().max() + 1e-6
    assert (ours.grad.double() - truth.grad).abs().max() <= gradient_budget


def test_float64_stays_float64() -> None:
    logits, labels = case(12, 7, torch.float64)
    got = per_sample_loss(logits, labels, torch.tensor([0, 5, 12])).loss
    want, _ = exact(logits, labels, [0, 5, 12])
    assert got.dtype is torch.float64
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_a_sample_without_a_counted_token_has_no_loss_and_no_gradient() -> None:
    logits, labels = case(9, 5, torch.float32, masked=0.0)
    labels[3:6] = -100
    logits = logits.requires_grad_()
    got = per_sample_loss(logits, labels, torch.tensor([0, 3, 6, 6, 9]))
    assert got.count.tolist() == [3, 0, 0, 3]
    assert got.loss[1] == 0 and got.loss[2] == 0
    got.loss.sum().backward()
    assert (logits.grad[3:6] == 0).all()
    assert (logits.grad[:3] != 0).any()


def test_all_masked_gives_zeros_throughout() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    got = per_sample_loss(logits, torch.full((4,), -100), torch.tensor([0, 2, 4]))
    got.loss.sum().backward()
    assert got.loss.tolist() == [0, 0] and got.count.tolist() == [0, 0]
    assert (logits.grad == 0).all()


def test_a_row_that_is_not_finite_spoils_its_own_sample_only() -> None:
    logits, labels = case(9, 5, torch.float32, masked=0.0)
    logits[4] = float("nan")
    logits = logits.requires_grad_()
    loss = per_sample_loss(logits, labels, torch.tensor([0, 3, 6, 9])).loss
    assert torch.isfinite(loss).tolist() == [True, False, True]
    loss[[0, 2]].sum().backward()
    assert torch.isfinite(logits.grad[[0, 1, 2, 6, 7, 8]]).all()


def test_another_ignore_index() -> None:
    logits, labels = case(8, 5, torch.float32, masked=0.0)
    got = per_sample_loss(logits, labels, torch.tensor([0, 8]), ignore_index=2)
    assert got.count.tolist() == [int((labels != 2).sum())]


def test_gradcheck_over_packed_samples() -> None:
    logits, labels = case(7, 4, torch.float64)
    cu = torch.tensor([0, 2, 2, 7])
    assert torch.autograd.gradcheck(lambda x: per_sample_loss(x, labels, cu).loss, (logits.requires_grad_(),))


def test_shifted_labels_do_not_cross_rows() -> None:
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert shift_labels(labels).tolist() == [2, 3, -100, 5, 6, -100]
    assert shift_labels(labels[:, :1]).tolist() == [-100, -100]
    assert labels.tolist() == [[1, 2, 3], [4, 5, 6]]


LOGITS, LABELS, CU = torch.zeros(6, 3), torch.zeros(6, dtype=torch.int64), torch.tensor([0, 6])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((LOGITS[None], LABELS, CU), r"logits: expected \[N, V\], got \(1, 6, 3\)"),
        ((LOGITS, LABELS[:5], CU), r"labels: expected \[6\], got \(5,\)"),
        ((LOGITS, LABELS.int(), CU), r"labels: expected int64, got torch.int32"),
        ((LOGITS, LABELS, CU.int()), r"cu_seqlens: expected int64 \[S \+ 1\], got torch.int32 \(2,\)"),
        ((LOGITS, LABELS, CU[None]), r"cu_seqlens: expected int64 \[S \+ 1\], got torch.int64 \(1, 2\)"),
        ((LOGITS, LABELS, torch.tensor([0, 5])), r"cu_seqlens: expected to rise from 0 to 6, got \[0, 5\]"),
        ((LOGITS, LABELS, torch.tensor([0, 7])), r"cu_seqlens: expected to rise from 0 to 6, got \[0, 7\]"),
        ((LOGITS, LABELS, torch.tensor([1, 6])), r"cu_seqlens: expected to rise from 0 to 6, got \[1, 6\]"),
        ((LOGITS, LABELS, torch.tensor([0, 4, 3, 6])), r"expected to rise from 0 to 6, got \[0, 4, 3, 6\]"),
        ((LOGITS, LABELS + 3, CU), r"labels: expected 0 to 2 or -100, got 3"),
        ((LOGITS, LABELS - 1, CU), r"labels: expected 0 to 2 or -100, got -1"),
    ],
)
def test_error_texts(arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        per_sample_loss(*arguments)


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction: expected 'mean' or 'sum', got 'median'"):
        per_sample_loss(LOGITS, LABELS, CU, reduction="median")
