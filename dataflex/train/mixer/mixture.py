"""The domains of a pool or of streams, and draws from them by proportions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.plan import Floats, Ids, Plan, check_proportions, generator
from dataflex.data.pool import Pool, TrainingPool
from dataflex.data.streams.stream_pool import StreamPool
from dataflex.train.mixer.permutation import domain_stream
from dataflex.utils.errors import UserError

if TYPE_CHECKING:
    from dataflex.config.schema import FlexSection

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


class Mixture(ABC):
    """Domains and draws from them: counts by the proportions, in shuffled order.

    names: of the domains. proportions: the present ones, float64 [K].
    A draw costs time and memory for what it draws and for the domains.
    """

    def __init__(self, names: Sequence[str], proportions: Floats, seed: int) -> None:
        self.names = list(names)
        self.seed = seed
        self.proportions = proportions
        self.initial_proportions = proportions.copy()
        self.drawn = np.zeros(len(self.names), dtype=np.int64)
        self._owed = np.zeros(len(self.names))

    @property
    @abstractmethod
    def sizes(self) -> Ids:
        """Samples of each domain, int64 [K]; UserError where they are not known."""

    @property
    @abstractmethod
    def epochs(self) -> Floats:
        """How often each domain was gone over, float64 [K]; 0 for an empty one, or where it is not known yet."""

    def take(self, proportions: Floats, count: int) -> Ids:
        """How many of ``count`` samples are of each domain, int64 [K]; counts them as drawn.

        UserError for a proportion of a domain without samples.
        """
        counts, owed = rounded_counts(proportions, count, self._owed)
        self._check(proportions, counts)
        self.drawn, self._owed = self.drawn + counts, owed
        self.proportions = proportions
        return counts

    def most(self, proportions: Floats) -> int:
        """How many samples surely hold no more than all of a domain: each count is within 1 of its proportion."""
        asked = proportions > 0
        return int(((self.sizes[asked] - 1) / proportions[asked]).min())

    def _check(self, proportions: Floats, counts: Ids) -> None:
        """UserError for counts that cannot be drawn."""
        return None

    def draw(self, proportions: Floats, count: int, phase: int) -> Plan:
        """A shuffled plan of ``count`` samples whose domain counts are ``proportions`` rounded.

        UserError for a proportion of a domain without samples.
        """
        before = self.drawn
        counts = self.take(proportions, count)
        domains = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(count) + np.repeat(before - (np.cumsum(counts) - counts), counts)
        order = generator(self.seed, "mixture order", phase).permutation(count)
        return self._plan(domains, positions, order, proportions)

    @abstractmethod
    def _plan(self, domains: Ids, positions: Ids, order: Ids, proportions: Floats) -> Plan:
        """The plan whose i-th sample is of ``domains[order[i]]``.

        domains, positions, order: int64 [n]; domains ascend, and so do the positions of each in its endless stream.
        """

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "owed": self._owed, "proportions": self.proportions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = np.asarray(state["drawn"], dtype=np.int64)
        self._owed = np.asarray(state["owed"], dtype=np.float64)
        self.proportions = np.asarray(state["proportions"], dtype=np.float64)


class MixtureManager(Mixture):
    """The domains of a pool: draws from each without replacement until it is used up, then reshuffles it.

    domain_ids: int [n], the domain of each sample of the pool.
    """

    def __init__(self, domain_ids: NDArray[Any], names: Sequence[str], proportions: Floats, seed: int) -> None:
        super().__init__(names, proportions, seed)
        self._sizes = np.bincount(domain_ids, minlength=len(self.names)).astype(np.int64)
        self._members = _Members(np.asarray(domain_ids), self._sizes)

    @property
    def sizes(self) -> Ids:
        return self._sizes

    @property
    def epochs(self) -> Floats:
        return self.drawn / np.maximum(self.sizes, 1)

    def _check(self, proportions: Floats, counts: Ids) -> None:
        empty = np.flatnonzero((counts > 0) & (self.sizes == 0))
        if empty.size:
            raise UserError(
                f"mixing: domain '{self.names[empty[0]]}' has no samples, its proportion is {proportions[empty[0]]:.3g}"
            )

    def _plan(self, domains: Ids, positions: Ids, order: Ids, proportions: Floats) -> Plan:
        """Each sample's probability is its domain's proportion / the domain's size."""
        ids = self._members.ids(domains, domain_stream(domains, positions, self.sizes, self.seed))
        probabilities = (proportions / np.maximum(self.sizes, 1))[domains]
        return Plan(ids[order], probabilities[order])


class StreamMixture(Mixture):
    """The domains of a `StreamPool`: takes each domain's samples in the order of its stream.

    sizes_so_far: samples of each domain's first pass, int64 [K], 0 until it is over.
    """

    def __init__(self, names: Sequence[str], proportions: Floats, seed: int, sizes_so_far: Callable[[], Ids]) -> None:
        super().__init__(names, proportions, seed)
        self._sizes_so_far = sizes_so_far

    @property
    def sizes(self) -> Ids:
        raise UserError(
            "streaming: proportions by size need the domains' sizes, which are not known; give "
            "init_mixture_proportions, or set streaming: false"
        )

    @property
    def epochs(self) -> Floats:
        sizes = self._sizes_so_far()
        return np.where(sizes > 0, self.drawn / np.maximum(sizes, 1), 0.0)

    def _plan(self, domains: Ids, positions: Ids, order: Ids, proportions: Floats) -> Plan:
        """The positions of a domain ascend along the plan. A sample's probability is its domain's proportion."""
        mixed = domains[order]
        ids = np.empty_like(mixed)
        ids[np.argsort(mixed, kind="stable")] = positions * len(self.names) + domains
        return Plan(ids, proportions[mixed])


def mixture_of(pool: TrainingPool, flex: FlexSection, seed: int) -> Mixture:
    """The domains of ``pool`` with the initial proportions of ``flex``: as given, else by the rule, else equal."""
    names = pool.domain_names
    if flex.init_mixture_proportions is not None:
        proportions = check_proportions(flex.init_mixture_proportions, names=names, source="init_mixture_proportions")
    elif flex.mixture_sample_rule == "stratified" and isinstance(pool, Pool):
        proportions = pool.domain_sizes() / len(pool)
    else:
        proportions = np.full(len(names), 1.0 / len(names))
    if isinstance(pool, StreamPool):
        return StreamMixture(names, proportions, seed, lambda: pool.sizes)
    assert isinstance(pool, Pool)
    return MixtureManager(pool.domain_ids, names, proportions, seed)
