"""All forms of the loss against float64, over drawn cases: by what runs here, and by the portable reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.ops import (
    SampleLoss,
    linear_per_sample_loss,
    loss_and_head_sketch,
    merge_vocab_shards,
    per_sample_loss,
)
from dataflex.ops.losses.loss_reference import fold
from tests.ops.loss_cases import DTYPES, Case, by_hand, cases, luck, plain_token_losses, within_budget


@pytest.fixture(params=["native", "portable"], scope="module", autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATAFLEX_OPS", request.param)
        yield


def run(case: Case, **more: bool) -> tuple[SampleLoss, torch.Tensor]:
    logits = case.logits.detach().requires_grad_()
    result = per_sample_loss(logits * 1 if more else logits, case.labels, case.cu_seqlens, **case.options, **more)
    result.loss.sum().backward()
    assert logits.grad is not None
    return result, logits.grad


@settings(deadline=None, max_examples=80)
@given(cases())
def test_losses_and_gradients_stay_within_twice_plain_pytorchs_error(case: Case) -> None:
    exact_loss, exact_gradient = by_hand(case)
    plain_loss, plain_gradient = by_hand(case, case.logits.dtype)
    result, gradient = run(case)
    within_budget(result.loss, exact_loss, plain_loss, luck(case))
    within_budget(gradient, exact_gradient, plain_gradient)
    assert gradient.dtype is case.logits.dtype
    kept = case.labels != -100
    assert int(result.count.sum()) == int(kept.sum())
    assert (gradient[~kept] == 0).all() and (result.token_loss[~kept] == 0).all() and (result.lse[~kept] == 0).all()
    again, gradient_again = run(case, inplace_backward=True)
    assert all(torch.equal(a, b) for a, b in zip(result, again, strict=True))
    assert torch.equal(gradient, gradient_again)


@pytest.mark.parametrize("vocabulary", [65_537, 131_072, 256_003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_vocabularies(vocabulary: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(vocabulary)
    logits = (3 * torch.randn(40, vocabulary, generator=draw)).to(dtype)
    labels = torch.randint(0, vocabulary, (40,), generator=draw)
    for rows in (40, 3):  # few rows are split over the vocabulary
        case = Case(logits[:rows], labels[:rows], torch.tensor([0, 1, rows]), {})
        exact_loss, exact_gradient = by_hand(case)
        plain_loss, plain_gradient = by_hand(case, dtype)
        result, gradient = run(case)
        within_budget(result.loss, exact_loss, plain_loss)
        within_budget(gradient, exact_gradient, plain_gradient)


@settings(deadline=None, max_examples=40)
@given(cases(dtypes=(torch.float32,)), st.lists(st.integers(1, 600), max_size=4))
def test_shards_of_a_vocabulary_add_up_with_their_gradients(case: Case, cuts: list[int]) -> None:
    options = {k: v for k, v in case.options.items() if k not in ("label_smoothing", "softcap")}
    softcap = case.options["softcap"]
    case = Case(case.logits, case.labels, case.cu_seqlens, {**case.options, "label_smoothing": 0.0})
    vocabulary = case.logits.shape[1]
    bounds = [0, *sorted({c for c in cuts if c < vocabulary}), vocabulary]
    logits = case.logits.detach().requires_grad_()
    shards = [
        per_sample_loss(logits[:, a:b], case.labels, case.cu_seqlens, softcap=softcap, vocab_offset=a)
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    merged = merge_vocab_shards(shards, case.labels, case.cu_seqlens, **options)
    merged.loss.sum().backward()
    exact_loss, exact_gradient = by_hand(case)
    torch.testing.assert_close(merged.loss.double(), exact_loss, rtol=1e-5, atol=2e-4)
    torch.testing.assert_close(logits.grad.double(), exact_gradient, rtol=1e-4, atol=2e-4)
    whole, _ = run(case)
    assert torch.equal(merged.count, whole.count)
    torch.testing.assert_close(merged.lse, whole.lse, rtol=1e-6, atol=1e-5)


def test_a_shard_of_minus_infinity_only_leaves_the_others_right() -> None:
    logits = torch.tensor([[-torch.inf, -torch.inf, 0.5, 2.0]], requires_grad=True)
    labels, cu = torch.tensor([3]), torch.tensor([0, 1])
    shards = [per_sample_loss(logits[:, a : a + 2], labels, cu, vocab_offset=a) for a in (0, 2)]
    merge_vocab_shards(shards, labels, cu).loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.softmax(logits.detach(), 1) - torch.eye(4)[3])


def test_a_label_whose_logit_is_lost_in_the_rounding_of_lse_is_still_its_shards() -> None:
    logits = torch.tensor([[2.0, 1e-9, 3.0, -1.0]], requires_grad=True)
    labels, cu = torch.tensor([1]), torch.tensor([0, 1])
    shards = [per_sample_loss(logits[:, a : a + 2], labels, cu, vocab_offset=a) for a in (0, 2)]
    assert torch.equal(shards[0].token_loss, shards[0].lse)
    merge_vocab_shards(shards, labels, cu).loss.sum().backward()
    expected = torch.softmax(logits.detach(), 1) - torch.eye(4)[1]
    torch.testing.assert_close(logits.grad, expected)


@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from([2, 16, 64, 128, 256, 1024]), st.integers(0, 99))
def test_the_sketch_is_the_fold_of_the_token_losses_gradient(case: Case, k1: int, seed: int) -> None:
    got = loss_and_head_sketch(case.logits, case.labels, case.cu_seqlens, k1=k1, seed=seed, tensor_id=7, **case.options)
    x = case.logits.detach().double().requires_grad_()
    kept = (case.labels != -100).nonzero()[:, 0]
    options = dict(case.options)
    if options["token_weight"] is not None:
        options["token_weight"] = options["token_weight"][kept]
    plain_token_losses(x[kept], case.labels[kept], options).sum().backward()
    bucket, sign = fold(x.shape[1], k1, seed, 7)
    want = torch.zeros(len(x), k1, dtype=torch.float64).index_add_(1, bucket, x.grad * sign)
    torch.testing.assert_close(got.sketch.double(), want, rtol=1e-5, atol=2e-5)
    loss, _ = run(case)
    torch.testing.assert_close(got.loss, loss.loss, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(cases(largest=90, dtypes=(torch.float32, torch.bfloat16)), st.integers(1, 12), st.booleans(), st.booleans())
def test_a_linear_head_in_chunks_equals_its_logits(case: Case, chunk: int, frozen: bool, biased: bool) -> None:
    tokens, vocabulary = case.logits.shape
    draw = torch.Generator().manual_seed(tokens)
    dtype = case.logits.dtype
    hidden = torch.randn(tokens, 24, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 24, generator=draw).to(dtype).requires_grad_(not frozen)
    bias = torch.randn(vocabulary, generator=draw).to(dtype).requires_grad_(not frozen) if biased else None
    got = linear_per_sample_loss(
        hidden, weight, case.labels, case.cu_seqlens, bias=bias, chunk_tokens=chunk, **case.options
    )
    got.loss.sum().backward()
    exact = [t.detach().double().requires_grad_() if t is not None else None for t in (hidden, weight, bias)]
    logits = exact[0] @ exact[1].T
    logits = logits if exact[2] is None else logits + exact[2]
    want = per_sample_loss(logits, case.labels, case.cu_seqlens, **case.options)
    want.loss.sum().backward()
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=2e-5, atol=2e-5)
    assert torch.equal(got.count, want.count)
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-4
    for ours, truth in zip((hidden, weight, bias), exact, strict=True):
        if ours is not None and ours.requires_grad:
            scale = max(1.0, float(truth.grad.abs().max())) if truth.grad.numel() else 1.0
            torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=tolerance, atol=tolerance * scale)


def test_a_linear_head_sketches_and_takes_gradients_of_every_output() -> None:
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 3, dtype=torch.float64, generator=draw)
    weight = torch.randn(8, 3, dtype=torch.float64, generator=draw)
    labels = torch.randint(0, 8, (7,), generator=draw)
    labels[3:5] = -100
    cu = torch.tensor([0, 4, 7])
    where = {"k1": 4, "seed": 3, "tensor_id": 9}
    got = loss_and_head_sketch(hidden, labels, cu, weight=weight, chunk_tokens=4, **where)
    want = loss_and_head_sketch(hidden @ weight.T, labels, cu, **where)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)

    def outputs(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        r = linear_per_sample_loss(h, w, labels, cu, chunk_tokens=4, z_loss=0.1)
        return r.loss, r.token_loss, r.lse

    assert torch.autograd.gradcheck(outputs, (hidden.requires_grad_(), weight.requires_grad_()))
    assert torch.autograd.gradcheck(lambda h: outputs(h, weight.detach())[0], (hidden,))
