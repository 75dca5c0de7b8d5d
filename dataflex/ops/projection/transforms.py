"""What becomes of a per-sample gradient before it is projected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

TRANSFORMS = ("sgd", "adam_less", "adam", "adam_fixed_v")


class Coefficients(NamedTuple):
    """Every Adam-like transform is (a m + c g) / (sqrt(b v + d g^2 + inside) + outside); computed in double."""

    a: float
    c: float
    b: float
    d: float
    inside: float
    outside: float


@dataclass(frozen=True)
class Transform:
    """One of `TRANSFORMS` and its constants.

    sgd           g
    adam_less     (b1 m + (1 - b1) g) / sqrt(b2 v + (1 - b2) g^2 + eps): LESS's official code
                  (arXiv 2402.04333, section 3.1: no bias correction, eps inside the root)
    adam          the step that Adam would take next: bias-corrected, eps outside the root; ``step`` is the
                  number of steps taken so far (Kingma and Ba, arXiv 1412.6980, algorithm 1)
    adam_fixed_v  (b1 m + (1 - b1) g) / sqrt(v + eps): linear in g
    """

    kind: str = "sgd"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    step: int = 0

    def __post_init__(self) -> None:
        if self.kind not in TRANSFORMS:
            raise ValueError(f"transform: expected one of {', '.join(TRANSFORMS)}, got {self.kind!r}")

    @property
    def needs_moments(self) -> bool:
        return self.kind != "sgd"

    def coefficients(self) -> Coefficients | None:
        """The transform as numbers, which is how every implementation takes it; None for sgd."""
        if self.kind == "sgd":
            return None
        first, second = self.beta1, self.beta2
        if self.kind == "adam_fixed_v":
            return Coefficients(first, 1.0 - first, 1.0, 0.0, self.eps, 0.0)
        if self.kind == "adam_less":
            return Coefficients(first, 1.0 - first, second, 1.0 - second, self.eps, 0.0)
        bias1, bias2 = 1.0 - first ** (self.step + 1), 1.0 - second ** (self.step + 1)
        return Coefficients(first / bias1, (1.0 - first) / bias1, second / bias2, (1.0 - second) / bias2, 0.0, self.eps)

    def __call__(self, grad: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None) -> Tensor:
        """grad: [..., M, K]; exp_avg, exp_avg_sq: [M, K] of the same dtype, or None for sgd."""
        return transformed(self.coefficients(), grad, exp_avg, exp_avg_sq)


def transformed(how: Coefficients | None, grad: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None) -> Tensor:
    """The formula of `Coefficients`; ``grad`` itself where ``how`` is None."""
    if how is None:
        return grad
    assert exp_avg is not None and exp_avg_sq is not None
    first = (exp_avg * how.a).add(grad, alpha=how.c)
    second = exp_avg_sq * how.b + how.inside
    if how.d:
        second = second.addcmul(grad, grad, value=how.d)
    return first / second.sqrt_().add_(how.outside)
