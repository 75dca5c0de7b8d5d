"""Weights that the configuration names: a .npy file with one number per row, and the weights of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataflex.data.encoding.token_weights import TokenWeights
from dataflex.data.sources.scan import check_weights
from dataflex.utils.errors import UserError, brief

if TYPE_CHECKING:
    from dataflex.config import Config


def read_array(path: str, key: str) -> np.ndarray:
    """The array in the .npy file at ``path``, mapped; no code of it runs. UserError naming ``key`` where it is none."""
    try:
        array: np.ndarray = np.load(Path(path).expanduser(), mmap_mode="r", allow_pickle=False)
        return array
    except Exception as exc:  # whatever else than an array may lie there, numpy says so in many ways
        raise UserError(f"{key}: {path} cannot be read as a .npy file: {brief(exc)}") from None


class WeightFile:
    """`sample_weight: file.npy`: one number per row of the datasets in their order, unusable rows included."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.values = read_array(path, "sample_weight")
        if self.values.ndim != 1 or self.values.dtype.kind not in "iuf":
            raise UserError(
                f"sample_weight: {path}: expected one number per row, got {self.values.dtype} {self.values.shape}"
            )
        self.taken: dict[str, int] = {}

    def take(self, count: int, rows: np.ndarray, name: str) -> np.ndarray:
        """The weights of ``rows`` out of the next ``count`` rows, those of dataset ``name``, float64."""
        start = sum(self.taken.values())
        self.taken[name] = count
        if start + count > len(self.values):
            self._wrong_length(f"the datasets have at least {start + count}")
        part = np.asarray(self.values[start : start + count], dtype=np.float64)
        return check_weights(part, count, f"sample_weight: {self.path}: dataset {name}")[rows]

    def check_used(self) -> None:
        """UserError where the file has more numbers than there are rows."""
        if sum(self.taken.values()) != len(self.values):
            self._wrong_length(f"the datasets have {sum(self.taken.values())}")

    def _wrong_length(self, need: str) -> None:
        rows = ", ".join(f"{name} {count}" for name, count in self.taken.items())
        raise UserError(f"sample_weight: {self.path} has {len(self.values)} numbers, {need} rows ({rows})")


def token_weights(cfg: Config) -> TokenWeights | None:
    """The weights of tokens that ``cfg`` asks for, or None. UserError for stage pt, which has none."""
    keys = cfg.weighting
    if not keys.weighs_tokens:
        return None
    if cfg.method.stage == "pt":
        raise UserError("token weights: stage pt has no roles, turns and answers; they need stage sft")
    roles = keys.role_weights or {}
    return TokenWeights(
        prompt=roles.get("prompt", 1.0),
        answer=roles.get("answer", 1.0),
        turns=keys.turn_weights or (),
        spans=tuple((start, *rest) for start, rest in (keys.token_weight_spans or {}).items()),
        column=keys.token_weight,
    )
