"""The loss ops of csrc: opcheck, bits, instruction sets, and the CUDA kernels under emulation against float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.ops import loss_and_head_sketch, per_sample_loss
from dataflex.ops.losses import loss_native as native
from dataflex.ops.losses.loss_options import LossOptions
from dataflex.ops.native import _ext
from tests.native.emulation import ORDERS, emulated
from tests.ops.loss_cases import DTYPES, Case, by_hand, cases, luck, within_budget
from tests.processes import PATIENCE_S


def needs_native() -> Any:
    ops = native.native_ops(torch.empty(0))
    if ops is None:
        pytest.skip("no native CPU ops here")
    return ops


def arguments(dtype: torch.dtype, tokens: int = 6, vocabulary: int = 70) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(tokens, vocabulary, generator=draw).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), generator=draw)
    labels[1] = -100
    weights = torch.rand(tokens, generator=draw), torch.rand(vocabulary, generator=draw)
    scalars = LossOptions(label_smoothing=0.1, z_loss=0.01).scalars()
    return logits, labels, torch.tensor([0, 2, 2, tokens]), *weights, *scalars


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_the_forward_and_the_sketch(dtype: torch.dtype) -> None:
    ops = needs_native()
    logits, *rest = arguments(dtype)
    logits = logits.requires_grad_()
    torch.library.opcheck(ops.loss_forward.default, (logits, *rest, False))
    keys, signs = native.sketch_tables(70, 64, 5, 1, torch.device("cpu"))
    even = native.uniform_sketch(70, 64, 5, 1, rest[3], torch.device("cpu"))
    torch.library.opcheck(ops.loss_sketch.default, (logits, *rest, keys, signs, even, 64, False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_the_backward(dtype: torch.dtype) -> None:
    ops = needs_native()
    logits, labels, cu, token_weight, class_weight, *scalars = arguments(dtype)
    _, count, _, lse, low = ops.loss_forward(logits, labels, cu, token_weight, class_weight, *scalars, False)
    grads = torch.ones(3), None, torch.ones(6)
    inputs = labels, cu, token_weight, class_weight, lse, low, count, *grads, *scalars
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.loss_backward.default, (logits, *inputs), test_utils=checks)
    torch.library.opcheck(ops.loss_backward_.default, (logits, *inputs), test_utils=checks[:2])
    want = ops.loss_backward(logits, *inputs)
    ops.loss_backward_(logits, *inputs)
    assert torch.equal(logits, want)


@pytest.mark.parametrize(("bounds", "vocabulary"), [((2, 5), 9), ((0, 3), 40_000), ((0,), 40_000), ((4, 1), 9)])
def test_rows_of_no_sample_have_their_own_loss_and_gradient_and_no_other(
    bounds: tuple[int, ...], vocabulary: int
) -> None:
    """On a device nothing looks at cu_seqlens: rows that it leaves out are as without samples, never as memory was."""
    draw = torch.Generator().manual_seed(2)
    logits, labels = torch.randn(6, vocabulary, generator=draw), torch.randint(0, vocabulary, (6,), generator=draw)
    labels[5] = -100
    token = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    of_token = torch.softmax(logits.double(), 1) - torch.nn.functional.one_hot(labels.clamp(min=0), vocabulary)
    of_token[5] = 0.0
    inside = torch.zeros(6, dtype=torch.float64)
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        inside[a:b] = 1 / max(1, int((labels[a:b] >= 0).sum()))
    scalars = LossOptions().scalars()
    torch.use_deterministic_algorithms(True)  # new memory holds NaN
    try:
        with emulated():
            ops, inputs = torch.ops.dataflex_emu, (labels, torch.tensor(bounds), None, None)
            loss, count, token_loss, lse, low = ops.loss_forward(logits, *inputs, *scalars, False)
            for each in (None, torch.ones(6)):
                grads = torch.ones(len(loss)), each, None
                gradient = ops.loss_backward(logits, *inputs, lse, low, count, *grads, *scalars)
                want = (inside + (0 if each is None else 1))[:, None] * of_token
                torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=1e-6)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(token_loss.double(), token, rtol=1e-5, atol=1e-5)
    if bounds == (0, 3):
        with pytest.raises(RuntimeError, match="cu_seqlens: expected to rise from 0 to 6"):
            needs_native().loss_forward(logits, labels, torch.tensor(bounds), None, None, *scalars, False)


def test_the_same_bits_again_and_for_any_number_of_threads_and_any_batch() -> None:
    needs_native()
    draw = torch.Generator().manual_seed(1)
    before = torch.get_num_threads()
    try:
        for tokens, vocabulary in ((70, 3001), (3, 70_001)):
            logits = torch.randn(tokens, vocabulary, generator=draw).requires_grad_()
            labels = torch.randint(0, vocabulary, (tokens,), generator=draw)
            seen = []
            for threads in (1, 2, 1, 3):
                torch.set_num_threads(threads)
                result = loss_and_head_sketch(logits, labels, torch.tensor([0, 1, tokens]), k1=256, seed=1, tensor_id=2)
                (gradient,) = torch.autograd.grad(result.loss.sum(), logits)
                seen.append((*result, gradient))
            for other in seen[1:]:
                assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


SUITE = """
import sys, torch
from tests.native.test_loss import sweep
sweep()
"""


def sweep() -> None:
    """One pass over dtypes, sizes and options against float64."""
    ops = needs_native()
    draw = torch.Generator().manual_seed(0)
    assert ops is torch.ops.dataflex
    for dtype in DTYPES:
        for vocabulary in (2, 17, 64, 65, 2051, 4096):
            for options in ({}, {"softcap": 20.0, "z_loss": 1e-3}, {"label_smoothing": 0.1}):
                logits = (5 * torch.randn(9, vocabulary, generator=draw)).to(dtype)
                labels = torch.randint(0, vocabulary, (9,), generator=draw)
                case = Case(logits, labels, torch.tensor([0, 4, 9]), options)
                (loss, gradient), plain = by_hand(case), by_hand(case, dtype)
                leaf = logits.clone().requires_grad_()
                result = per_sample_loss(leaf, labels, case.cu_seqlens, **options)
                result.loss.sum().backward()
                within_budget(result.loss, loss, plain[0])
                within_budget(leaf.grad, gradient, plain[1])
                got = loss_and_head_sketch(logits, labels, case.cu_seqlens, k1=64, seed=1, tensor_id=2, **options)
                exact = logits.double()
                want = loss_and_head_sketch(exact, labels, case.cu_seqlens, k1=64, seed=1, tensor_id=2, **options)
                torch.testing.assert_close(got.sketch.double(), want.sketch, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    needs_native()
    env = os.environ | {"DATAFLEX_ISA": isa}
    done = subprocess.run([sys.executable, "-c", SUITE], env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


def check_emulated(case: Case, k1: int) -> None:
    """Loss, gradient and sketch of the CUDA kernels, inside `emulated`."""
    (loss, gradient), plain = by_hand(case), by_hand(case, case.logits.dtype)
    leaf = case.logits.detach().requires_grad_()
    result = per_sample_loss(leaf, case.labels, case.cu_seqlens, **case.options)
    result.loss.sum().backward()
    within_budget(result.loss, loss, plain[0], luck(case))
    within_budget(leaf.grad, gradient, plain[1])
    kept = case.labels != -100
    assert (leaf.grad[~kept] == 0).all() and (result.token_loss[~kept] == 0).all()
    folded = {"k1": k1, "seed": 1, "tensor_id": 2}
    got = loss_and_head_sketch(case.logits, case.labels, case.cu_seqlens, **folded, **case.options)
    want = loss_and_head_sketch(case.logits.double(), case.labels, case.cu_seqlens, **folded, **case.options)
    torch.testing.assert_close(got.sketch.double(), want.sketch, rtol=2e-5, atol=3e-5)
    torch.testing.assert_close(got.loss, result.loss, rtol=2e-6, atol=2e-6)


@settings(deadline=None, max_examples=25)
@given(cases(largest=300), st.sampled_from(ORDERS), st.sampled_from([64, 256]))
def test_emulated_kernels_over_drawn_cases(case: Case, order: tuple[str, int], k1: int) -> None:
    with emulated(*order):
        check_emulated(case, k1)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_emulated_kernels_over_split_rows_and_large_sketches(order: str, seed: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(seed)
    vocabulary = 20_011
    logits = torch.randn(3, vocabulary, generator=draw).to(dtype)
    labels = torch.tensor([0, -100, vocabulary - 1])
    with emulated(order, seed):
        for k1 in (2048, 4096, 8192):
            check_emulated(Case(logits, labels, torch.tensor([0, 1, 3]), {"softcap": 5.0} if k1 == 4096 else {}), k1)


def test_an_emulated_softcap_takes_a_logit_of_minus_infinity_for_minus_the_cap() -> None:
    """The loss of two equal logits, both at the cap's end, is ln 2."""
    logits = torch.tensor([[-700.0, -700.0], [-torch.inf, -700.0]])
    with emulated():
        case = Case(logits, torch.tensor([1, 1]), torch.tensor([0, 1, 2]), {"softcap": 30.0})
        check_emulated(case, 64)
        got = loss_and_head_sketch(*case[:3], k1=64, seed=1, tensor_id=2, softcap=30.0)
    torch.testing.assert_close(got.loss, torch.full((2,), math.log(2)), rtol=1e-6, atol=1e-6)


def test_an_emulated_softcap_keeps_a_nan_to_its_own_row() -> None:
    """Clamping is by instructions that would rather have a number."""
    logits = torch.tensor([[1.0, torch.nan, 2.0], [3.0, 0.5, -1.0]])
    leaf = logits.clone().requires_grad_()
    inputs = torch.tensor([0, 0]), torch.tensor([0, 1, 2])
    with emulated():
        loss = per_sample_loss(leaf, *inputs, softcap=4.0).loss
        loss.sum().backward()
        folded = loss_and_head_sketch(logits, *inputs, k1=64, seed=1, tensor_id=2, softcap=4.0)
    capped = 4 * torch.tanh(logits[1].double() / 4)
    for each in (loss, folded.loss):
        assert each.isnan().tolist() == [True, False]
        assert each[1].item() == pytest.approx(float(capped.logsumexp(0) - capped[0]), abs=4e-7)
    assert leaf.grad is not None and leaf.grad.isnan().all(1).tolist() == [True, False]


def test_emulated_kernels_leave_a_label_out_of_range_to_its_own_sample() -> None:
    logits = torch.randn(4, 40)
    with emulated():
        ops = torch.ops.dataflex_emu
        labels, cu = torch.tensor([3, 40, -5, 2]), torch.tensor([0, 1, 2, 3, 4])
        scalars = LossOptions().scalars()
        loss, count, _, lse, low = ops.loss_forward(logits, labels, cu, None, None, *scalars, False)
        assert loss.isnan().tolist() == [False, True, True, False]
        grads = torch.ones(4), None, None
        gradient = ops.loss_backward(logits, labels, cu, None, None, lse, low, count, *grads, *scalars)
        assert gradient.isnan().any(1).tolist() == [False, True, True, False]


def test_the_native_op_refuses_what_would_read_out_of_bounds() -> None:
    ops = needs_native()
    logits, labels, cu, _, _, *scalars = arguments(torch.float32)
    for bad in (
        (logits, labels[:-1], cu, None, None),
        (logits, labels.int(), cu, None, None),
        (logits, labels, torch.tensor([0, 7]), None, None),
        (logits, labels, torch.tensor([-1, 6]), None, None),
        (logits, labels, cu, torch.ones(5), None),
        (logits, labels, cu, None, torch.ones(69)),
        (logits.double(), labels, cu, None, None),
        (logits.T, labels, cu, None, None),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            ops.loss_forward(*bad, *scalars, False)


def test_nothing_is_native_when_portable_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATAFLEX_OPS", "portable")
    assert isinstance(_ext.load("cpu"), _ext.Unavailable)
    logits, labels, cu, *_ = arguments(torch.float32)
    portable = per_sample_loss(logits, labels, cu, softcap=10.0)
    monkeypatch.delenv("DATAFLEX_OPS")
    needs_native()
    for a, b in zip(portable, per_sample_loss(logits, labels, cu, softcap=10.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
