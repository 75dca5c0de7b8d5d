"""Gradient transforms against their formulas, and `adam` against the step that torch's Adam takes."""

from __future__ import annotations

import pytest
import torch

from dataflex.ops import Transform
from tests.ops.by_hand import FORMULAS

CONSTANTS = [(0.9, 0.999, 1e-8, 0), (0.9, 0.999, 1e-8, 5000), (0.8, 0.95, 1e-6, 7), (0.0, 0.999, 1e-3, 1)]


def tensors(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients [count, 5, 9] and moments [5, 9], one of them zero as for a row that was never touched."""
    draw = torch.Generator().manual_seed(count)
    gradient = torch.randn(count, 5, 9, generator=draw, dtype=torch.float64)
    first = torch.randn(5, 9, generator=draw, dtype=torch.float64)
    second = torch.rand(5, 9, generator=draw, dtype=torch.float64)
    first[2], second[2] = 0, 0
    return gradient, first, second


@pytest.mark.parametrize("kind", sorted(FORMULAS))
@pytest.mark.parametrize("constants", CONSTANTS)
def test_equals_the_formula(kind: str, constants: tuple[float, float, float, int]) -> None:
    gradient, first, second = tensors(3)
    kept = gradient.clone(), first.clone(), second.clone()
    got = Transform(kind, *constants)(gradient, first, second)
    torch.testing.assert_close(got, FORMULAS[kind](gradient, first, second, *constants), rtol=1e-11, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(kept, (gradient, first, second), strict=True))


@pytest.mark.parametrize("steps", [1, 4])
def test_adam_is_the_step_that_the_optimizer_takes(steps: int) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 9, generator=draw, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(0.8, 0.97), eps=1e-5, weight_decay=0.0)
    for _ in range(steps):
        weight.grad = torch.randn(5, 9, generator=draw, dtype=torch.float64)
        optimizer.step()
    gradient = torch.randn(5, 9, generator=draw, dtype=torch.float64)
    state = optimizer.state[weight]
    predicted = Transform("adam", 0.8, 0.97, 1e-5, steps)(gradient, state["exp_avg"], state["exp_avg_sq"])
    before = weight.detach().clone()
    weight.grad = gradient
    optimizer.step()
    torch.testing.assert_close(before - weight.detach(), predicted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["sgd", "adam_fixed_v"])
def test_the_linear_ones_are_linear_in_the_gradient(kind: str) -> None:
    gradient, first, second = tensors(2)
    transform = Transform(kind)
    both = transform(gradient.sum(0, keepdim=True), first, second)
    nothing = transform(torch.zeros_like(both), first, second)
    each = transform(gradient, first, second)
    torch.testing.assert_close(both + nothing, each.sum(0, keepdim=True), rtol=1e-9, atol=1e-6)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="transform: expected one of sgd, adam_less, adam, adam_fixed_v, got 'adams'"):
        Transform("adams")
