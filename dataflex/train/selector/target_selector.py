"""The base class of selectors that compare the pool with a target: a table of scores, and a rule that takes from it."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.core.plan import Ids
from dataflex.data.subtasks import Subtasks
from dataflex.scoring.decide.rules import Decision, check_rule, decide
from dataflex.scoring.decide.table import BLOCK_ROWS, ScoreTable, on_main
from dataflex.train.selector.base_selector import Selector, Served
from dataflex.utils import dist
from dataflex.utils.errors import UserError, nearest

PER = ("subtask", "target")
SHOWN_COLUMNS = 32


def check_shares(name: str, aggregate: str, per: str, vote_share: float | None) -> None:
    """UserError, in the name of the selector, for params of a `TargetSelector` that cannot be."""
    check_rule(aggregate, f"{name}: aggregate")
    if per not in PER:
        raise UserError(f"{name}: per: '{per}'{nearest(per, PER)}; valid: {', '.join(PER)}")
    if vote_share is not None and not 0 < vote_share < 1:
        raise UserError(f"{name}: vote_share: expected a share of the pool between 0 and 1, got {vote_share}")
    if vote_share is not None and aggregate != "vote":
        raise UserError(f"{name}: vote_share: is of aggregate: vote; with {aggregate} leave it out")


class TargetSelector(Selector):
    """Takes what a rule takes from a table of scores: a column for each subtask of the target, or for each sample.

    name: of the component, for messages. target: its datasets are the subtasks, or with ``subtask_column`` the values
    of that column. aggregate: one of `scoring.decide.rules.RULES`. per: ``subtask`` (a column is the mean over the
    subtask's samples) or ``target`` (a column is a sample). vote_share: of `aggregate: vote`, the share of the pool
    that a column votes for; by default the share that is picked. A subclass makes the table.
    """

    takes_domain_counts = True
    decides_by = frozenset({"aggregate", "per", "vote_share", "subtask_column"})
    limit = "candidates"
    """The param that limits `candidates`, for messages."""

    def __init__(
        self,
        dataset: Any,
        accelerator: Any,
        data_collator: Any,
        cache_dir: Any,
        *,
        name: str,
        target: Any,
        subtask_column: str | None = None,
        aggregate: str = "max",
        per: str = "subtask",
        vote_share: float | None = None,
    ) -> None:
        super().__init__(dataset, accelerator, data_collator, cache_dir)
        if target is None or len(target) == 0:
            raise UserError(f"{name}: eval_dataset: the target is empty; set eval_dataset or val_size")
        check_shares(name, aggregate, per, vote_share)
        self.name, self.target = name, target
        self.subtasks = Subtasks.of(target, subtask_column, f"{name}: ")
        self.aggregate, self.per, self.vote_share = aggregate, per, vote_share

    @property
    def columns(self) -> Ids:
        """The table's column that each sample of the target belongs to, int64 [len(target)]."""
        return self.subtasks.ids if self.per == "subtask" else np.arange(len(self.subtasks.ids), dtype=np.int64)

    @property
    def width(self) -> int:
        """How many columns the table has."""
        return len(self.subtasks.names) if self.per == "subtask" else len(self.subtasks.ids)

    @property
    def target_identity(self) -> str:
        """What kept scores are of, besides the pool and the weights."""
        return f"{self.target.fingerprint} {hashlib.sha256(self.columns.tobytes()).hexdigest()[:16]}"

    @abstractmethod
    def table(self) -> ScoreTable | None:
        """Scores of the pool's samples [N, `width`] with the model as it is now; a collective.

        Rank 0's counts; the others may have None, or one that all of them read together. None everywhere where a pass
        only tries what it takes.
        """

    @property
    def order(self) -> Ids | None:
        """Columns in the order of a round robin; None: each once. Samples of the target are served `in_turns`."""
        return in_turns(self.subtasks.ids) if self.per == "target" else None

    def candidates(self) -> Ids | None:
        """The samples that a decision may take, ascending; None: all. A collective."""
        return None

    def each(self) -> NDArray[np.float32] | None:
        """`table` in memory, float32 [N, `width`], on rank 0 alone: what `score` keeps; a collective."""
        table = self.table()
        return None if table is None else on_main(table)

    @property
    def names(self) -> list[str]:
        """Of the table's columns; a single sample of the target is SUBTASK[PLACE]."""
        if self.per == "subtask":
            return self.subtasks.names
        return [f"{self.subtasks.names[kind]}[{place}]" for place, kind in enumerate(self.subtasks.ids)]

    def table_at(self, step_id: int) -> ScoreTable | None:
        """What a decision is made from; made once for it."""
        return self.table()

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        table = self.once(step_id, lambda: self.table_at(step_id))
        source = f"{self.name} at step {step_id}"
        counts = kwargs.get("domain_counts")
        decision = self._decided(table, num_samples, counts, source, self.candidates())
        self._note(table, decision)
        return decision.picks.tolist()

    def _decided(
        self,
        table: ScoreTable | None,
        count: int,
        domain_counts: Ids | None,
        source: str,
        candidates: Ids | None = None,
    ) -> Decision:
        """Rank 0's decision on every rank: of all candidates, or with ``domain_counts`` of each domain in turn."""

        def make() -> Decision | None:
            if table is None:
                return None
            how: dict[str, Any] = {"vote_share": self.vote_share, "order": self.order, "source": source}
            if domain_counts is None:
                self._enough(candidates, count, source)
                return decide(table, count, self.aggregate, candidates, **how)
            domains, parts, turn = np.asarray(self.dataset.domain_ids), list[Decision](), 0
            for domain, wanted in enumerate(domain_counts.tolist()):
                among = np.flatnonzero(domains == domain)
                if candidates is not None:
                    among = np.intersect1d(among, candidates)
                self._enough(among, wanted, f"{source}: '{self.dataset.domain_names[domain]}'")
                parts.append(decide(table, wanted, self.aggregate, among, turn=turn, **how))
                turn += wanted
            return _joined(parts)

        found = dist.broadcast_object(dist.together(make))
        assert found is not None
        return found

    def _enough(self, candidates: Ids | None, count: int, source: str) -> None:
        """UserError where there are fewer candidates than ``count``."""
        if candidates is not None and len(candidates) < count:
            raise UserError(
                f"{source}: {self.limit}: {len(candidates)} samples may be taken, {count} are asked for; raise it"
            )

    @property
    def _advice(self) -> str:
        """What helps a subtask that gets too few picks."""
        dealt = self.aggregate in ("round_robin", "doubly_greedy")
        return "set per: subtask" if dealt else "set aggregate: round_robin"

    def _note(self, table: ScoreTable | None, decision: Decision) -> None:
        """The selector's record of a decision."""
        subtask = self.subtasks.ids[decision.column] if self.per == "target" else decision.column
        names = np.array(self.subtasks.names, dtype=object)
        score = decision.score if table is None else _scores_of(table, decision)
        self.served = Served(self.subtasks.names, subtask, score, self._advice)
        self.metric = {"score": decision.score.tolist(), "serves": names[subtask].tolist()}
        if self.per == "target":
            self.metric["target"] = decision.column.tolist()
        if table is not None:
            serves = np.full(len(self.dataset), None, dtype=object)
            serves[decision.picks] = names[subtask]
            named = self.subtasks.names if self.per == "subtask" else []
            self.scored = _columns(table, decision.every, named) | {"serves": serves}


def in_turns(subtasks: Ids) -> Ids:
    """Places in ``subtasks`` [n], each subtask in turn and in it each of its places in turn: int64 [longest x T].

    After as many turns as the largest subtask has places, all have had the same number.
    """
    members = [np.flatnonzero(subtasks == k) for k in np.unique(subtasks)]
    longest = max(len(places) for places in members)
    return np.stack([np.resize(places, longest) for places in members], axis=1).reshape(-1)


def _scores_of(table: ScoreTable, decision: Decision) -> NDArray[np.float32]:
    """Of each pick for the column that it serves, whatever the rule took it for, float32 [k]."""
    found = np.empty(len(decision.picks), dtype=np.float32)
    for start in range(0, len(found), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        column = decision.column[part]
        found[part] = table.rows(decision.picks[part])[np.arange(len(column)), column]
    return found


def _joined(parts: Sequence[Decision]) -> Decision:
    """Decisions among different samples as one."""
    every = None
    for part in parts:
        if part.every is not None:
            every = part.every if every is None else np.where(np.isnan(every), part.every, every)
    picks, column, score = (np.concatenate([getattr(p, of) for p in parts]) for of in ("picks", "column", "score"))
    return Decision(picks, column, score, every)


def _columns(table: ScoreTable, every: NDArray[Any] | None, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """For the decision's table: ``score`` is what every sample is ranked by, else its largest; columns that have names.

    every: [N], NaN where it is not known.
    """
    shown = len(names) if 1 < len(names) <= SHOWN_COLUMNS else 0
    score = np.empty(table.shape[0], dtype=np.float32 if every is None else every.dtype)
    each = np.empty((shown, table.shape[0]), dtype=np.float32)
    for start, block in table.blocks():
        score[start : start + len(block)] = block.max(axis=1)
        each[:, start : start + len(block)] = block.T[:shown]
    if every is not None:
        score[:] = every
    return {"score": score} | {f"score: {name}": each[j] for j, name in enumerate(names[:shown])}
