"""What a gradient feature is: which parameters, the optimizer's view of them, and how it is projected."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dataflex.scoring.gradients.layers import LayerRule


@dataclass(frozen=True)
class FeatureSpec:
    """adam: a `Transform` kind, None for the plain gradient. proj_dim: 0 for exact scores without a projection."""

    adam: str | None = None
    layers: LayerRule = LayerRule()
    proj_dim: int = 8192
    projection: str = "xorfold"
    seed: int = 42

    def of_target(self) -> FeatureSpec:
        """The same for the target's side, which is the plain gradient (arXiv 2402.04333, section 4.2)."""
        return replace(self, adam=None)

    def projected(self) -> dict[str, Any]:
        """The arguments of `Scorer.stream_features`."""
        assert self.proj_dim > 0, "exact scores have no features"
        return {
            "adam": self.adam,
            "layers": self.layers,
            "proj_dim": self.proj_dim,
            "projection": self.projection,
            "seed": self.seed,
        }
