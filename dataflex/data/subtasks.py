"""The subtasks of a target: its datasets, or the values of one of its columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.utils.errors import UserError, nearest

MOST_PARTS = 100


@dataclass(frozen=True)
class Subtasks:
    """names: of those that have samples. ids: int64 [n], which of them each sample of the target belongs to.

    column: where they are the values of one.
    """

    names: list[str]
    ids: NDArray[np.int64]
    column: str | None = None

    @classmethod
    def of(cls, target: Any, column: str | None, source: str = "") -> Subtasks:
        """By ``column`` of the target's samples, else by its datasets. source: begins a UserError."""
        if column is None:
            kinds, ids = np.unique(np.asarray(target.domain_ids, dtype=np.int64), return_inverse=True)
            return cls([str(target.domain_names[kind]) for kind in kinds], ids.astype(np.int64))
        values = []
        for i in range(len(target)):
            sample = target[i]
            if column not in sample:
                place = f" ({target.whence(i)})" if hasattr(target, "whence") else ""
                raise UserError(
                    f"{source}subtask_column: sample {i} of the target{place} has no '{column}'"
                    f"{nearest(column, sample)}; it has {', '.join(sample)}"
                )
            values.append(str(sample[column]))
        names, ids = np.unique(values, return_inverse=True)
        return cls([str(name) for name in names], ids.astype(np.int64), column)

    def parts(self) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """("<column>_<value>", mask [n]) of the subtasks that are no datasets, as long as there are at most 100."""
        if self.column is not None and len(self.names) <= MOST_PARTS:
            for kind, name in enumerate(self.names):
                yield f"{self.column}_{name}", self.ids == kind
