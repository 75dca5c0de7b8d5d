"""`MixtureManager`: the domains of a pool, and draws from them by proportions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.plan import Floats, Ids, Plan, epoch_stream, generator, largest_remainder


class MixtureManager:
    """Draws from each domain without replacement until it is used up, then reshuffles it.

    domain_ids: int [n], the domain of each sample of the pool. proportions: the present ones, float64 [K].
    """

    def __init__(self, domain_ids: NDArray[Any], names: Sequence[str], proportions: Floats, seed: int) -> None:
        self.names = list(names)
        self.seed = seed
        self.proportions = proportions
        self.initial_proportions = proportions.copy()
        order = np.argsort(domain_ids, kind="stable").astype(np.int64)
        self.sizes = np.bincount(domain_ids, minlength=len(self.names)).astype(np.int64)
        self._members = np.split(order, np.cumsum(self.sizes)[:-1])
        self.drawn = np.zeros(len(self.names), dtype=np.int64)

    def draw(self, proportions: Floats, count: int, phase: int) -> Plan:
        """A shuffled plan of ``count`` samples whose domain counts are ``proportions`` rounded.

        Each sample's probability is its domain's proportion / the domain's size.
        """
        counts = largest_remainder(proportions, count)
        ids: list[Ids] = []
        probabilities: list[Floats] = []
        for d, members in enumerate(self._members):
            at = int(self.drawn[d])
            places = epoch_stream(len(members), self.seed, f"domain {d}", at, int(counts[d]))
            ids.append(members[places])
            probabilities.append(np.full(len(places), proportions[d] / max(1, len(members))))
        self.drawn = self.drawn + counts
        self.proportions = proportions
        order = generator(self.seed, "mixture order", phase).permutation(count)
        return Plan(np.concatenate(ids)[order], np.concatenate(probabilities)[order])

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "proportions": self.proportions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = np.asarray(state["drawn"], dtype=np.int64)
        self.proportions = np.asarray(state["proportions"], dtype=np.float64)
