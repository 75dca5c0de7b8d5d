"""The gradient transforms as their papers and codes write them, for comparison with `dataflex.ops.Transform`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Formula = Callable[[Tensor, Tensor, Tensor, float, float, float, int], Tensor]


def sgd(g: Tensor, m: Tensor, v: Tensor, beta1: float, beta2: float, eps: float, step: int) -> Tensor:
    return g


def adam_less(g: Tensor, m: Tensor, v: Tensor, beta1: float, beta2: float, eps: float, step: int) -> Tensor:
    """As LESS's official code: no bias correction, eps inside the root."""
    return (beta1 * m + (1 - beta1) * g) / (beta2 * v + (1 - beta2) * g**2 + eps) ** 0.5


def adam(g: Tensor, m: Tensor, v: Tensor, beta1: float, beta2: float, eps: float, step: int) -> Tensor:
    """The step that Adam takes after ``step`` steps, per unit of learning rate."""
    first = (beta1 * m + (1 - beta1) * g) / (1 - beta1 ** (step + 1))
    second = (beta2 * v + (1 - beta2) * g**2) / (1 - beta2 ** (step + 1))
    return first / (second**0.5 + eps)


def adam_fixed_v(g: Tensor, m: Tensor, v: Tensor, beta1: float, beta2: float, eps: float, step: int) -> Tensor:
    return (beta1 * m + (1 - beta1) * g) / (v + eps) ** 0.5


FORMULAS: dict[str, Formula] = {
    "sgd": sgd,
    "adam_less": adam_less,
    "adam": adam,
    "adam_fixed_v": adam_fixed_v,
}
