"""`MixtureManager`: the domains of a pool, and draws from them by proportions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.plan import Floats, Ids, Plan, generator
from dataflex.train.mixer.permutation import domain_stream
from dataflex.utils.errors import UserError

_WHOLE = 1e-9


def rounded_counts(proportions: Floats, total: int, owed: Floats) -> tuple[Ids, Floats]:
    """Counts [K] that sum to ``total``, each within 1 of ``proportions * total``, and what is then owed [K].

    Largest remainders, where ``owed``, what earlier roundings left out, counts as well: so a domain of which a phase
    holds less than one sample gets its share over the phases.
    """
    exact = proportions / proportions.sum() * total
    counts: Ids = np.floor(exact + _WHOLE).astype(np.int64)
    rest = exact - counts
    order = np.argsort(-np.where(rest > _WHOLE, rest + owed, -np.inf), kind="stable")
    counts[order[: int(total - counts.sum())]] += 1
    return counts, owed + exact - counts


class _Members:
    """The sample ids of each domain: ranges where every domain lies in one piece, else one sorted list [n]."""

    def __init__(self, domain_ids: NDArray[Any], sizes: Ids) -> None:
        changes = np.flatnonzero(domain_ids[1:] != domain_ids[:-1]) + 1
        self.starts = np.cumsum(sizes) - sizes
        self.order: Ids | None = None
        if len(changes) == np.count_nonzero(sizes) - 1:
            firsts = np.concatenate([[0], changes])
            self.starts[domain_ids[firsts]] = firsts
        else:
            self.order = np.argsort(domain_ids, kind="stable").astype(np.int64)

    def ids(self, domains: Ids, places: Ids) -> Ids:
        at = self.starts[domains] + places
        return at if self.order is None else self.order[at]


class MixtureManager:
    """Draws from each domain without replacement until it is used up, then reshuffles it.

    domain_ids: int [n], the domain of each sample of the pool. proportions: the present ones, float64 [K].
    A draw costs time and memory for what it draws and for the domains, not for the pool.
    """

    def __init__(self, domain_ids: NDArray[Any], names: Sequence[str], proportions: Floats, seed: int) -> None:
        self.names = list(names)
        self.seed = seed
        self.proportions = proportions
        self.initial_proportions = proportions.copy()
        self.sizes = np.bincount(domain_ids, minlength=len(self.names)).astype(np.int64)
        self._members = _Members(np.asarray(domain_ids), self.sizes)
        self.drawn = np.zeros(len(self.names), dtype=np.int64)
        self._owed = np.zeros(len(self.names))

    @property
    def epochs(self) -> Floats:
        """How often each domain was gone over, float64 [K]; 0 for an empty one."""
        return self.drawn / np.maximum(self.sizes, 1)

    def take(self, proportions: Floats, count: int) -> Ids:
        """How many of ``count`` samples are of each domain, int64 [K]; counts them as drawn.

        UserError for a proportion of a domain without samples.
        """
        counts, owed = rounded_counts(proportions, count, self._owed)
        empty = np.flatnonzero((counts > 0) & (self.sizes == 0))
        if empty.size:
            raise UserError(
                f"mixing: domain '{self.names[empty[0]]}' has no samples, its proportion is {proportions[empty[0]]:.3g}"
            )
        self.drawn, self._owed = self.drawn + counts, owed
        self.proportions = proportions
        return counts

    def draw(self, proportions: Floats, count: int, phase: int) -> Plan:
        """A shuffled plan of ``count`` samples whose domain counts are ``proportions`` rounded.

        Each sample's probability is its domain's proportion / the domain's size. UserError for a proportion of a
        domain without samples.
        """
        before = self.drawn
        counts = self.take(proportions, count)
        domains = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(count) + np.repeat(before - (np.cumsum(counts) - counts), counts)
        ids = self._members.ids(domains, domain_stream(domains, positions, self.sizes, self.seed))
        probabilities = (proportions / np.maximum(self.sizes, 1))[domains]
        order = generator(self.seed, "mixture order", phase).permutation(count)
        return Plan(ids[order], probabilities[order])

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "owed": self._owed, "proportions": self.proportions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = np.asarray(state["drawn"], dtype=np.int64)
        self._owed = np.asarray(state["owed"], dtype=np.float64)
        self.proportions = np.asarray(state["proportions"], dtype=np.float64)
