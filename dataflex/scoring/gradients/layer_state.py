"""What a gradient pass holds of the parameters' size, one layer at a time: Adam's moments and exact directions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from torch import Tensor

# Of moments, and as much of directions: state that fits is read once a pass and stays, so that an adapter's is not
# gathered anew for every batch.
KEPT_BYTES = 1 << 30

State = TypeVar("State")  # a tensor, or a tuple of them


class LayerState(Mapping[str, State], Generic[State]):
    """State by the name of a parameter, read when the backward reaches its layer and dropped behind it.

    source: makes the whole state of a parameter each time it is asked, as a collective: so every rank must ask for
    the same names in the same order. What fits ``kept_bytes`` (`KEPT_BYTES`) in all is read here, in the order of
    ``source``, and stays: where all of it fits, no backward has a collective, whichever layers a rank's batch reaches.
    """

    def __init__(self, source: Mapping[str, State], kept_bytes: int | None = None) -> None:
        self._source = source
        self._names = frozenset(source)
        self._kept: dict[str, State] = {}
        self._here: dict[str, State] = {}
        room = KEPT_BYTES if kept_bytes is None else kept_bytes
        for name in source if room else ():
            state = source[name]
            size = _bytes(state)
            if size <= room:
                self._kept[name], room = state, room - size

    @contextmanager
    def at_hand(self, names: Iterable[str]) -> Iterator[None]:
        """Inside, the state of ``names`` is there without a collective, as often as it is asked for."""
        mine = [name for name in names if name in self._names and name not in self._here]
        for name in mine:
            self._here[name] = self[name]
        try:
            yield
        finally:
            for name in mine:
                del self._here[name]

    def __getitem__(self, name: str) -> State:
        if name in self._here:
            return self._here[name]
        if name in self._kept:
            return self._kept[name]
        return self._source[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


def _bytes(state: Any) -> int:
    return sum(tensor.nbytes for tensor in ((state,) if isinstance(state, Tensor) else state))
