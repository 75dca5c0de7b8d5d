"""From scores to chosen samples: how many of each domain, the best of each, near-duplicates left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.core.plan import largest_remainder
from dataflex.scoring.batches import Ids
from dataflex.scoring.decide.rules import IN_TURNS, Decision, decide
from dataflex.scoring.decide.table import ScoreTable
from dataflex.utils.errors import UserError, nearest

RowsOf = Callable[[Ids], NDArray[Any]]
BLOCK = 512


def domain_quotas(
    quotas: str | Mapping[str, float] | None, count: int, names: Sequence[str], sizes: NDArray[Any]
) -> NDArray[np.int64] | None:
    """Samples to take of each domain, int64 [domains], by largest remainder; None where scores alone decide.

    quotas: ``proportional`` (to ``sizes``), ``equal``, or {domain: share}, domains that are not named getting none.
    UserError for an unknown domain, and where a domain has fewer samples than its quota.
    """
    if quotas is None:
        return None
    if isinstance(quotas, str):
        shares = np.asarray(sizes, dtype=np.float64) if quotas == "proportional" else np.ones(len(names))
    else:
        for name in quotas:
            if name not in names:
                raise UserError(f"select_quotas: no dataset '{name}'{nearest(name, names)}; scored: {', '.join(names)}")
        shares = np.array([quotas.get(name, 0.0) for name in names])
    counts = largest_remainder(shares / shares.sum(), count)
    for name, asked, there in zip(names, counts, sizes, strict=True):
        if asked > there:
            raise UserError(f"select_quotas: {asked:,} samples of '{name}' are asked for, it has {there:,}")
    return counts


class Choice(NamedTuple):
    """picks: int64 [k] sample ids, best first. column: int64 [k], the table's column that each of them serves."""

    picks: Ids
    column: Ids


def choose(
    table: ScoreTable,
    domains: NDArray[Any],
    count: int,
    quotas: NDArray[np.int64] | None = None,
    rows_of: RowsOf | None = None,
    alike: float = 1.0,
    device: torch.device | str = "cpu",
    rule: str = "max",
    columns: Ids | None = None,
    vote_share: float | None = None,
) -> Choice:
    """At most ``count`` samples by a rule of `decide`. columns: its order of the columns. vote_share: as it takes it.

    domains: [N]. quotas: so many of each domain, by the rule within it. rows_of: features [k, d] of sample ids [k];
    with it a sample is passed over where its cosine with a better one that was taken is ``alike`` or more, which may
    leave fewer than ``count``. UserError for scores that are not finite.
    """
    parts: list[tuple[Ids | None, int]] = [(None, count)]
    if quotas is not None:
        parts = [(np.flatnonzero(domains == d), int(quota)) for d, quota in enumerate(quotas)]
    gate = None if rows_of is None else Unlike(rows_of, alike, torch.device(device))
    in_turns = rule in IN_TURNS
    decisions: list[Decision] = []
    turn = 0
    for among, wanted in parts:
        size = len(domains) if among is None else len(among)
        how: dict[str, Any] = {"turn": turn, "order": columns, "source": "select"}
        if rule == "vote" and wanted:
            how["vote_share"] = vote_share or wanted / size
        if in_turns:
            how["gate"] = gate
        most = size if gate is not None and wanted and not in_turns else wanted
        decisions.append(decide(table, most, rule, among, **how))
        turn += len(decisions[-1].picks)
    order = _in_order(decisions, by_score=rule in ("max", "mean"))
    if gate is None or in_turns:
        return order
    kept = _without_duplicates(order.picks, domains, count, quotas, gate)
    at = np.argsort(order.picks)
    return Choice(kept, order.column[at[np.searchsorted(order.picks[at], kept)]])


def _in_order(decisions: Sequence[Decision], by_score: bool) -> Choice:
    """The picks of several decisions, best first: by score, or by how early each was taken."""
    picks, column, score = (
        np.concatenate([getattr(one, of) for one in decisions]) for of in ("picks", "column", "score")
    )
    if len(decisions) == 1:
        return Choice(picks, column)
    place = np.concatenate([(np.arange(len(one.picks)) + 0.5) / max(1, len(one.picks)) for one in decisions])
    order = np.lexsort((picks, -score if by_score else place))
    return Choice(picks[order], column[order])


def _without_duplicates(
    order: Ids, domains: NDArray[Any], count: int, quotas: NDArray[np.int64] | None, gate: Unlike
) -> Ids:
    left = np.full(int(domains.max()) + 1, count, dtype=np.int64) if quotas is None else quotas.copy()
    picks: list[int] = []

    def coming(at: int) -> Ids:
        part = order[at : at + BLOCK]
        return part[left[domains[part]] > 0]

    for at, sample in enumerate(order.tolist()):
        if len(picks) == count:
            break
        if left[domains[sample]] > 0 and gate.admits(sample, partial(coming, at)):
            gate.took(sample)
            picks.append(sample)
            left[domains[sample]] -= 1
    return np.array(picks, dtype=np.int64)


class Unlike:
    """Admits samples whose cosine with each that was taken is below ``alike``: a `columns.Gate`.

    Holds the unit features of what was taken, fp16 on the device, and those of the samples that are asked about next.
    """

    def __init__(self, rows_of: RowsOf, alike: float, device: torch.device) -> None:
        self.rows_of, self.alike, self.device = rows_of, alike, device
        self.parts: list[torch.Tensor] = []
        self.ids = np.empty(0, dtype=np.int64)  # of those that are asked about, ascending
        self.mine: list[int] = []  # places in them of what was taken
        self.unit = torch.empty(0)
        self.known = np.empty(0, dtype=np.bool_)
        self.among = np.empty((0, 0), dtype=np.bool_)

    def admits(self, sample: int, coming: Callable[[], Ids]) -> bool:
        at = self._place(sample)
        if at is None:
            self._read(np.union1d(coming(), [sample]))
            at = self._place(sample)
        return not self.known[at]

    def took(self, sample: int) -> None:
        at = self._place(sample)
        assert at is not None, "asked about before"
        self.mine.append(at)
        self.known |= self.among[at]

    def _place(self, sample: int) -> int | None:
        at = int(np.searchsorted(self.ids, sample))
        return at if at < len(self.ids) and self.ids[at] == sample else None

    def _read(self, ids: Ids) -> None:
        """Go on with the features of ``ids``, ascending, and what of them is like what was taken."""
        if self.mine:
            self.parts.append(self.unit[self.mine].half())
        if len(self.parts) > 1 and len(self.parts[-2]) < BLOCK:
            self.parts[-2:] = [torch.cat(self.parts[-2:])]
        self.ids, self.mine = ids, []
        rows = torch.from_numpy(np.ascontiguousarray(self.rows_of(ids))).to(self.device).float()
        self.unit = torch.nn.functional.normalize(rows, dim=1)
        known = torch.zeros(len(ids), dtype=torch.bool, device=self.device)
        for part in self.parts:
            known |= (self.unit @ part.float().T >= self.alike).any(dim=1)
        self.known = known.cpu().numpy()
        self.among = (self.unit @ self.unit.T >= self.alike).cpu().numpy()
