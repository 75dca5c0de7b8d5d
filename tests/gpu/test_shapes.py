"""Sizes, strides, streams and graphs that only a device shows: on the CPU those of them that it has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dataflex.ops import Projection, Sums, linear_per_sample_loss, per_sample_loss, project_per_sample_grad_
from tests.ops.loss_cases import DTYPES, Case, by_hand, within_budget

OF = Projection(tensor_id=2, seed=1)


def needs_cuda(device: torch.device, count: int = 1) -> None:
    if device.type != "cuda" or torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} CUDA device{'s' if count > 1 else ''}")


def check(logits: Tensor, labels: Tensor, cu_seqlens: Tensor, inplace: bool = False) -> None:
    """Loss and gradient of strided logits on a device against float64."""
    case = Case(logits.cpu(), labels, cu_seqlens, {})
    exact, plain = by_hand(case), by_hand(case, logits.dtype)
    leaf = logits.detach().requires_grad_()
    x = leaf * 1 if inplace else leaf
    result = per_sample_loss(x, labels.to(leaf.device), cu_seqlens.to(leaf.device), inplace_backward=inplace)
    (gradient,) = torch.autograd.grad(result.loss.sum(), leaf)
    within_budget(result.loss.cpu(), exact[0], plain[0])
    within_budget(gradient.cpu(), exact[1], plain[1])


@pytest.mark.parametrize("vocabulary", [257, 50257, 151669])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_vocabularies_misaligned_and_strided_rows(
    vocabulary: int, dtype: torch.dtype, device: torch.device
) -> None:
    draw = torch.Generator().manual_seed(vocabulary)
    labels, cu_seqlens = torch.randint(0, vocabulary, (7,), generator=draw), torch.tensor([0, 1, 7])
    labels[1] = -100
    flat = 3 * torch.randn(7 * (vocabulary + 5), generator=draw)
    for skip, gap in ((0, 0), (1, 0), (3, 5)):
        wide = flat.to(device, dtype)[skip : skip + 7 * (vocabulary + gap) - gap * (skip > 0)]
        strided = torch.as_strided(wide, (7, vocabulary), (vocabulary + gap, 1))
        check(strided, labels, cu_seqlens, inplace=gap == 0)
    across = flat[: 7 * vocabulary].to(device, dtype).view(vocabulary, 7).T
    check(across, labels, cu_seqlens)


def test_more_than_two_to_the_31_logits(device: torch.device) -> None:
    needs_cuda(device)
    vocabulary, rows = 131072, (1 << 14) + 8
    x = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device=device)
    x[-1, 5] = 3.0
    labels = torch.full((rows,), 5, device=device)
    leaf = x.requires_grad_()
    result = per_sample_loss(leaf, labels, torch.tensor([0, rows - 1, rows], device=device))
    (gradient,) = torch.autograd.grad(result.loss.sum(), leaf)
    last = torch.zeros(vocabulary, dtype=torch.float64)
    last[5] = 3.0
    exact = torch.logsumexp(last, 0) - 3.0
    assert abs(float(result.loss[1]) - float(exact)) < 1e-4
    hit = float(torch.softmax(last, 0)[5] - 1)
    assert abs(float(gradient[-1, 5]) - hit) < 5e-3 and float(gradient[-1].float().abs().sum()) < 2.01


def test_more_rows_than_a_grid_has_in_its_second_dimension(device: torch.device) -> None:
    draw, rows = torch.Generator().manual_seed(0), 70_001
    x, labels = torch.randn(rows, 9, generator=draw), torch.randint(0, 9, (rows,), generator=draw)
    leaf = x.to(device).clone().requires_grad_()
    bounds = torch.tensor([0, 5, 5, rows], device=device)
    loss = per_sample_loss(leaf, labels.to(device), bounds, reduction="sum").loss
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    exact = torch.softmax(x.double(), 1) - torch.nn.functional.one_hot(labels, 9)
    assert float((gradient.double().cpu() - exact).abs().max()) < 1e-5


def a_step(leaf: Tensor, labels: Tensor, bounds: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, gradient and features; nothing in it may wait for the device."""
    loss = per_sample_loss(leaf, labels, bounds).loss
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    out.zero_()
    project_per_sample_grad_(Sums(out), leaf.detach()[:, :128], leaf.detach()[:, 128:640], bounds, OF)
    return loss.detach(), gradient


def step_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(4)
    leaf = torch.randn(64, 32000, generator=draw).to(device, torch.bfloat16).requires_grad_()
    labels = torch.randint(0, 32000, (64,), generator=draw).to(device)
    return leaf, labels, torch.tensor([0, 30, 64], device=device), torch.zeros(2, 4096, device=device)


def test_another_stream_gives_the_same_bits(device: torch.device) -> None:
    needs_cuda(device)
    inputs = step_inputs(device)
    want = [*a_step(*inputs), inputs[-1].clone()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = [*a_step(*inputs), inputs[-1].clone()]
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_captured_graph_gives_the_same_bits(device: torch.device) -> None:
    needs_cuda(device)
    inputs = step_inputs(device)
    want = [*a_step(*inputs), inputs[-1].clone()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            a_step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = a_step(*inputs)
    inputs[-1].fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip([*made, inputs[-1]], want, strict=True))


def test_nothing_in_a_step_waits_for_the_device(device: torch.device) -> None:
    needs_cuda(device)
    inputs = step_inputs(device)
    a_step(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        a_step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_second_device_is_set_by_the_ops(device: torch.device) -> None:
    needs_cuda(device, 2)
    want = a_step(*step_inputs(device))
    got = a_step(*step_inputs(torch.device("cuda:1")))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))


def test_a_label_out_of_range_spoils_its_own_sample(device: torch.device) -> None:
    needs_cuda(device)
    x = torch.randn(4, 50, device=device, requires_grad=True)
    labels = torch.tensor([1, 99, 3, 4], device=device)
    loss = per_sample_loss(x, labels, torch.tensor([0, 2, 4], device=device)).loss
    (gradient,) = torch.autograd.grad(loss[1], x)
    assert bool(loss[0].isnan()) and bool(loss[1].isfinite()) and bool(gradient[2:].isfinite().all())


def test_a_head_of_a_real_vocabulary_without_its_logits(device: torch.device) -> None:
    draw = torch.Generator().manual_seed(2)
    tokens, vocabulary = (300, 50257) if device.type == "cuda" else (30, 1031)
    hidden, weight = torch.randn(tokens, 64, generator=draw), torch.randn(vocabulary, 64, generator=draw) / 8
    labels = torch.randint(0, vocabulary, (tokens,), generator=draw)
    bounds = torch.tensor([0, 7, tokens])
    leaf = hidden.to(device).clone().requires_grad_()
    loss = linear_per_sample_loss(leaf, weight.to(device), labels.to(device), bounds.to(device), chunk_tokens=64).loss
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    wide = hidden.double().requires_grad_()
    exact = per_sample_loss(wide @ weight.double().T, labels, bounds).loss
    (right,) = torch.autograd.grad(exact.sum(), wide)
    assert float((loss - exact.to(loss)).detach().abs().max()) < 1e-4
    assert float((gradient.double().cpu() - right).norm() / right.norm()) < 1e-4
