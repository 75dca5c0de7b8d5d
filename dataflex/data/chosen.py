"""A dataset_dir that `dataflex-cli select` wrote: what was chosen, at what cost, and what a config means in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from dataflex.data.sources.info import find_dataset_dir, read_dataset_infos
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger
from dataflex.utils.records import DamagedError, Record, read_sealed

if TYPE_CHECKING:
    from dataflex.config import Config

CHOSEN = "dataflex_selection.json"

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=0)]


class Cost(Record):
    """What it took to come to scores, or to a choice.

    selection_seconds: all of it. warmup_seconds: the part of it that trained the checkpoints that scored, up to them.
    samples_scored, tokens_scored: what went through passes, targets included, and how many samples a second.
    samples_taken_up: of shards that an earlier start had made, whose time is in none of these. peak_memory_mib: the
    highest of a process, of its device or on a CPU its own. processes: of the scoring.
    """

    selection_seconds: NotNegative
    warmup_seconds: NotNegative = 0.0
    samples_scored: Whole = 0
    samples_scored_per_second: NotNegative = 0.0
    tokens_scored: Whole = 0
    samples_taken_up: Whole = 0
    peak_memory_mib: NotNegative = 0.0
    processes: Whole = 1

    @property
    def line(self) -> str:
        """The cost for people."""
        warmup = f", {self.warmup_seconds:,.1f} of them training that came before" if self.warmup_seconds else ""
        shards = f"; {self.samples_taken_up:,} samples taken up, their time is not counted"
        if not self.samples_scored + self.samples_taken_up:
            return f"cost of the selection: {self.selection_seconds:,.1f} s"
        rate, each = f"{self.samples_scored_per_second:,.1f} samples/s", f"{self.peak_memory_mib:,.0f} MiB"
        return (
            f"cost of the selection: {self.selection_seconds:,.1f} s{warmup}; {self.samples_scored:,} samples, "
            f"{self.tokens_scored:,} tokens scored, {rate}; processes: {self.processes}, memory of one: {each}"
            f"{shards * bool(self.samples_taken_up)}"
        )

    def of_run(self, results: dict[str, float]) -> dict[str, float]:
        """The figures of a run's own selection (`LogHook.summary`) with what it took to choose its data before."""
        own = Cost(
            selection_seconds=results.get("selection_seconds", 0.0),
            samples_scored=int(results.get("samples_scored", 0)),
            samples_scored_per_second=results.get("samples_scored_per_second", 0.0),
        )
        both = self.plus(own)
        return {
            "selection_seconds": both.selection_seconds,
            "selection_warmup_seconds": self.warmup_seconds,
            "samples_scored": both.samples_scored,
            "samples_scored_per_second": both.samples_scored_per_second,
        }

    @property
    def passes_s(self) -> float:
        """Seconds inside the passes."""
        return self.samples_scored / self.samples_scored_per_second if self.samples_scored_per_second else 0.0

    def plus(self, other: Cost) -> Cost:
        """The cost of both."""
        scored, passes_s = self.samples_scored + other.samples_scored, self.passes_s + other.passes_s
        return Cost(
            selection_seconds=round(self.selection_seconds + other.selection_seconds, 3),
            warmup_seconds=round(self.warmup_seconds + other.warmup_seconds, 3),
            samples_scored=scored,
            samples_scored_per_second=round(scored / passes_s, 3) if passes_s else 0.0,
            tokens_scored=self.tokens_scored + other.tokens_scored,
            samples_taken_up=self.samples_taken_up + other.samples_taken_up,
            peak_memory_mib=max(self.peak_memory_mib, other.peak_memory_mib),
            processes=max(self.processes, other.processes),
        )


class Chosen(Record):
    """What `CHOSEN` says. picked: rows of each dataset. held_out: datasets of the rows that val_size held out when the
    others were scored. aggregate: the rule, and made_from: the folders or the file that it chose by.
    """

    picked: dict[str, Whole]
    held_out: list[str] = []
    aggregate: str | None = None
    made_from: list[str] = []
    cost: Cost


def read_chosen(dataset_dir: Path) -> Chosen | None:
    """What `select` says of its folder; None for any other folder. UserError where it is damaged."""
    if not (dataset_dir / CHOSEN).exists():
        return None
    try:
        return read_sealed(dataset_dir / CHOSEN, Chosen)
    except DamagedError as error:
        raise UserError(f"{dataset_dir}: {error}; select again") from None


def with_chosen_data(cfg: Config) -> Config:
    """``cfg`` without the datasets that have ``num_samples: 0``, of which nothing was chosen.

    Where ``val_size`` held out a part before the rest was chosen from, that part is what is held out now. UserError
    where nothing is left, or a dataset that is left out has a share of the mixture.
    """
    if not cfg.data.dataset:
        return cfg
    folder = find_dataset_dir(cfg.data.dataset_dir, cfg.source)
    infos = read_dataset_infos(cfg.data.dataset, folder)
    empty = [info.name for info in infos if info.num_samples == 0]
    changes: dict[str, Any] = {}
    if empty:
        changes["dataset"] = tuple(name for name in cfg.data.dataset if name not in empty)
        if not changes["dataset"]:
            raise UserError(f"dataset: no rows, since num_samples is 0 for {', '.join(empty)} in {folder}")
        logger.info(f"dataset: nothing is read of {', '.join(empty)}: num_samples is 0 (of a selection: no picks)")
    chosen = read_chosen(folder) if cfg.data.val_size else None
    if chosen is not None and chosen.held_out:
        changes |= {"val_size": 0.0, "eval_dataset": tuple(chosen.held_out)}
        logger.info(
            f"val_size: what was held out when {folder} was chosen is held out again: {', '.join(chosen.held_out)}"
        )
    if not changes:
        return cfg
    return _without_shares(cfg, empty).model_copy(update={"data": cfg.data.model_copy(update=changes)})


def _without_shares(cfg: Config, empty: list[str]) -> Config:
    """``cfg`` whose keys with a value for each dataset have none for those that are left out."""
    shares, weights = cfg.flex.init_mixture_proportions, cfg.weighting.domain_weights
    if shares is not None:
        named = list(zip(cfg.data.dataset, shares, strict=True))
        for name, share in named:
            if name in empty and share:
                raise UserError(
                    f"init_mixture_proportions: {share:g} for '{name}', which has no rows (num_samples: 0); give it 0"
                )
        left = tuple(share for name, share in named if name not in empty)
        cfg = cfg.model_copy(update={"flex": cfg.flex.model_copy(update={"init_mixture_proportions": left})})
    if weights is not None:
        kept = {name: weight for name, weight in weights.items() if name not in empty} or None
        cfg = cfg.model_copy(update={"weighting": cfg.weighting.model_copy(update={"domain_weights": kept})})
    return cfg
