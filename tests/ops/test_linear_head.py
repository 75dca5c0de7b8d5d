"""A linear head without its logits: what it takes beyond a plain one, weights known before, and its blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dataflex.ops import linear_per_sample_loss, per_sample_loss
from dataflex.ops.losses import linear_deltas
from dataflex.ops.losses.linear_deltas import LinearLossGrad
from dataflex.ops.losses.linear_products import Products
from dataflex.ops.losses.linear_sweep import Sweep, Weights
from dataflex.ops.losses.loss_linear import linear_losses
from dataflex.ops.losses.loss_options import LossOptions

N, V, H, R = 30, 2111, 12, 3
CU = torch.tensor([0, 11, 12, 12, N])
FORMS = [(1.0, 0.0, False, False), (0.125, 0.0, True, False), (1.0, 4.0, False, True), (1.5, 3.0, True, True)]


class Case:
    """A head of float64: its parts as leaves, labels of which some do not count, weights and factors."""

    def __init__(self, biased: bool, adapted: bool, dtype: torch.dtype = torch.float64) -> None:
        draw = torch.Generator().manual_seed(1)

        def leaf(*size: int) -> Tensor:
            return torch.randn(*size, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()

        self.x, self.weight = leaf(N, H), leaf(V, H)
        self.bias = leaf(V) if biased else None
        self.low = (leaf(N, R), leaf(V, R)) if adapted else None
        self.labels = torch.randint(0, V, (N,), generator=draw)
        self.labels[::4] = -100
        self.labels[11] = -100
        self.factors = torch.rand(N, generator=draw)
        self.token_weight = torch.rand(N, generator=draw)

    @property
    def products(self) -> Products:
        return Products(((self.x, self.weight), *([self.low] if self.low else [])), self.bias)

    def leaves(self) -> list[Tensor]:
        return [t for t in self.products.flat() if t is not None]

    def logits(self, scale: float) -> Tensor:
        total = self.x @ self.weight.T
        if self.low:
            total = total + self.low[0] @ self.low[1].T
        return scale * (total if self.bias is None else total + self.bias)


def gradients(case: Case, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, case.leaves()))


@pytest.mark.parametrize(("scale", "softcap", "biased", "adapted"), FORMS)
@pytest.mark.parametrize("known", [True, False])
def test_weights_known_before_and_after_give_the_gradient_of_the_logits(
    scale: float, softcap: float, biased: bool, adapted: bool, known: bool
) -> None:
    case = Case(biased, adapted)
    options = LossOptions(softcap=softcap)
    want = per_sample_loss(case.logits(scale), case.labels, CU, softcap=softcap, token_weight=case.token_weight)
    total = (want.token_loss * case.factors).sum()
    weights = Weights(case.token_weight, factors=case.factors if known else None)
    losses, made, _ = linear_losses(case.products, case.labels, CU, weights, Sweep(options, 7, scale))
    torch.testing.assert_close(losses.loss, want.loss)
    torch.testing.assert_close(losses.lse, want.lse)
    assert losses.loss.requires_grad is not known
    got = (losses.token_loss * case.factors).sum() if made is None else made
    torch.testing.assert_close(got, total)
    for mine, theirs in zip(gradients(case, 3 * got), gradients(case, 3 * total), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_made_in_the_sweep_are_given_once() -> None:
    case = Case(False, False)
    weights = Weights(factors=case.factors)
    total = linear_losses(case.products, case.labels, CU, weights, Sweep(LossOptions(), 7))[1]
    assert total is not None
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken by a first backward"):
        total.backward()


@pytest.mark.parametrize("frozen", [True, False])
def test_half_logits_are_as_good_as_those_of_pytorch(frozen: bool) -> None:
    exact, half = Case(False, False), Case(False, False, torch.bfloat16)
    half.weight.requires_grad_(not frozen)

    def run(case: Case, made: Any) -> list[Tensor]:
        leaves = [t for t in case.leaves() if t.requires_grad]
        return [made.detach(), *torch.autograd.grad(made, leaves)]

    truth = run(exact, per_sample_loss(exact.x @ exact.weight.T, exact.labels, CU).loss.sum())
    plain = run(half, per_sample_loss(half.x @ half.weight.T, half.labels, CU).loss.sum())
    how: dict[str, Any] = {"chunk_tokens": 7, "half_logits": True}
    ours = run(half, linear_per_sample_loss(half.x, half.weight, half.labels, CU, **how).loss.sum())
    for want, theirs, mine in zip(truth, plain, ours, strict=False):
        assert (mine.double() - want).norm() <= 2 * (theirs.double() - want).norm() + 1e-3 * want.norm()


def test_small_factors_survive_half_precision() -> None:
    """Made in the sweep, the gradient of a token is far below what float16 holds; its scaled one is not."""
    case = Case(False, False, torch.float16)
    factors = torch.full((N,), 2.0**-22)
    total = linear_losses(case.products, case.labels, CU, Weights(factors=factors), Sweep(LossOptions(), 7))[1]
    assert total is not None
    (got,) = torch.autograd.grad(total * 2.0**18, case.x)
    want = (per_sample_loss(case.x @ case.weight.T, case.labels, CU, reduction="sum").loss.sum() * 2.0**-4,)
    (want,) = torch.autograd.grad(*want, case.x)
    assert (got - want).norm() < 2e-2 * want.norm()


@pytest.mark.parametrize(("scale", "softcap", "biased", "adapted"), FORMS)
def test_blocks_of_the_vocabulary_are_the_gradient_of_the_logits(
    scale: float, softcap: float, biased: bool, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_deltas, "_BLOCK_BYTES", 0)
    case = Case(biased, adapted)
    raw = case.logits(1.0).detach().requires_grad_()
    want = per_sample_loss(scale * raw, case.labels, CU, softcap=softcap)
    (wanted,) = torch.autograd.grad((want.token_loss * case.factors).sum(), raw)
    grad = LinearLossGrad(case.products, case.labels, want.lse.detach(), case.factors, scale, softcap)
    got = torch.zeros_like(wanted)
    widths = []
    with torch.no_grad():
        for columns, delta in grad.blocks():
            got[grad.rows, columns] = delta
            widths.append(delta.shape[1])
    assert widths == [1024, 1024, 63]
    torch.testing.assert_close(got, wanted)
    counted = (case.labels != -100).double()
    sizes = torch.segment_reduce(counted, "sum", lengths=CU.diff(), unsafe=True).long()
    assert grad.bounds(CU).diff().tolist() == sizes.tolist()
    assert torch.equal(grad.inputs(0), case.x[grad.rows])
