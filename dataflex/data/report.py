"""What was read, what was left out and why, and how long the samples are."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

PERCENTILES = (5, 50, 95)
FIRST_PLACES = 3


@dataclass
class DomainReport:
    """Counts of one dataset. ``dropped`` maps a reason to (rows, the places of the first ones)."""

    name: str
    read: int = 0
    dropped: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    not_chosen: int = 0
    all_masked: int = 0
    truncated: int = 0
    duplicates: int = 0
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lengths: tuple[int, int, int, int] = (0, 0, 0, 0)

    def drop(self, reason: str, where: str) -> None:
        """Count a row that cannot be used; the places of the first ones are kept."""
        count, places = self.dropped.get(reason, (0, []))
        self.dropped[reason] = (count + 1, (places + [where])[:FIRST_PLACES])

    @property
    def reasons(self) -> str:
        """Why rows were dropped, how many and where: ``5 no answer (x.json:1, x.json:2)``."""
        return "; ".join(f"{count} {reason} ({', '.join(at)})" for reason, (count, at) in self.dropped.items())

    def measure(self, lengths: np.ndarray, trained: np.ndarray) -> None:
        """Take samples, tokens and the length percentiles from the tokens per sample (int [N])."""
        self.samples = len(lengths)
        self.tokens, self.trained_tokens = int(lengths.sum()), int(trained.sum())
        if len(lengths):
            low, middle, high = (round(x) for x in np.percentile(lengths, PERCENTILES))
            self.lengths = (low, middle, high, int(lengths.max()))

    def lines(self) -> list[str]:
        share = self.trained_tokens / self.tokens if self.tokens else 0.0
        numbers = "/".join(f"{n:,}" for n in self.lengths)
        lines = [
            f"{self.name}: {self.samples:,} samples of {self.read:,} rows, {self.tokens:,} tokens "
            f"({share:.0%} trained on), length 5%/50%/95%/max {numbers}"
        ]
        notes = [
            f"{count:,} {what}"
            for count, what in (
                (self.truncated, "truncated to cutoff_len"),
                (self.duplicates, "duplicates (kept)"),
                (self.all_masked, "without a trained token (dropped)"),
                (self.not_chosen, "left out by num_samples or max_samples"),
            )
            if count
        ]
        if notes:
            lines.append("  " + ", ".join(notes))
        for reason, (count, places) in self.dropped.items():
            more = ", ..." if count > len(places) else ""
            lines.append(f"  {count:,} dropped: {reason} ({', '.join(places)}{more})")
        return lines


@dataclass
class DataReport:
    """Counts of all datasets; ``held_out`` samples were moved from training to evaluation by val_size.

    streams: a line for each training dataset that is streamed, and so not counted.
    """

    train: list[DomainReport] = field(default_factory=list)
    eval: list[DomainReport] = field(default_factory=list)
    held_out: int = 0
    shared_rows: int = 0
    streams: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for the screen."""
        lines = [*self.streams, *(line for report in self.train for line in report.lines())]
        if self.held_out:
            lines.append(f"val_size holds {self.held_out:,} samples out of training for evaluation")
        for report in self.eval:
            first, *rest = report.lines()
            lines += [f"evaluation: {first}", *rest]
        if self.shared_rows:
            lines.append(f"note: {self.shared_rows:,} evaluation samples are also in the training data")
        return lines
