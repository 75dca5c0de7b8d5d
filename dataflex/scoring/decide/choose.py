"""From scores to chosen samples: how many of each domain, the best of each, near-duplicates left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.core.plan import largest_remainder
from dataflex.scoring.batches import Ids
from dataflex.scoring.decide.rules import Decision, decide
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
    turn = 0
    if quotas is not None:
        parts = [(np.flatnonzero(domains == d), int(quota)) for d, quota in enumerate(quotas)]
    decisions: list[Decision] = []
    for among, wanted in parts:
        size = len(domains) if among is None else len(among)
        share = (vote_share or wanted / size) if rule == "vote" and wanted else None
        most = size if rows_of is not None and wanted else wanted
        decisions.append(decide(table, most, rule, among, vote_share=share, turn=turn, order=columns, source="select"))
        turn += wanted
    order = _in_order(decisions, by_score=rule in ("max", "mean"))
    if rows_of is None:
        return order
    kept = _without_duplicates(order.picks, domains, count, quotas, _Taken(rows_of, alike, torch.device(device)))
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
    order: Ids, domains: NDArray[Any], count: int, quotas: NDArray[np.int64] | None, taken: _Taken
) -> Ids:
    left = np.full(int(domains.max()) + 1, count, dtype=np.int64) if quotas is None else quotas.copy()
    picks: list[int] = []
    for start in range(0, len(order), BLOCK):
        open_ones = order[start : start + BLOCK]
        open_ones = open_ones[left[domains[open_ones]] > 0]
        if len(open_ones) == 0:
            continue
        for place in taken.offer(open_ones, left, domains, count - len(picks)):
            picks.append(place)
        if len(picks) == count:
            break
    return np.array(picks, dtype=np.int64)


class _Taken:
    """The unit features of what was taken, fp16 on the device."""

    def __init__(self, rows_of: RowsOf, alike: float, device: torch.device) -> None:
        self.rows_of, self.alike, self.device = rows_of, alike, device
        self.parts: list[torch.Tensor] = []

    def offer(self, places: Ids, left: NDArray[np.int64], domains: NDArray[Any], most: int) -> list[int]:
        """Those of ``places``, in order, that are like none taken before; ``left`` is counted down by domain."""
        rows = torch.from_numpy(np.ascontiguousarray(self.rows_of(places))).to(self.device).float()
        unit = torch.nn.functional.normalize(rows, dim=1)
        alike = torch.zeros(len(places), dtype=torch.bool, device=self.device)
        for part in self.parts:
            alike |= (unit @ part.float().T >= self.alike).any(dim=1)
        among = (unit @ unit.T >= self.alike).cpu().numpy()
        known = alike.cpu().numpy()
        mine: list[int] = []
        for i, place in enumerate(places.tolist()):
            if len(mine) == most:
                break
            if known[i] or left[domains[place]] == 0 or among[i, mine].any():
                continue
            mine.append(i)
            left[domains[place]] -= 1
        self.parts.append(unit[mine].half())
        return [int(places[i]) for i in mine]
