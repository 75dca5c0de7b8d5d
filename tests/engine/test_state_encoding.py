"""What a checkpoint keeps of hooks and components: any state of plain values survives, nothing else is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.engine import checkpoint
from dataflex.utils.errors import UserError

STATE: dict[str, Any] = {
    "int": np.arange(5),
    "float": np.linspace(0, 1, 6).reshape(2, 3),
    "empty": np.empty((0, 4), dtype=np.float32),
    "scalar array": np.array(2.5),
    "numpy scalars": [np.int64(3), np.float32(0.5), np.bool_(True)],
    "unsigned": np.arange(4, dtype=np.uint32),
    "mask": np.array([True, False]),
    "reversed": np.arange(4)[::-1],
    "tensor": torch.arange(3.0),
    "plain": {"a": [1, 2.5, "x", None, True, b"raw"], "b": (1, ("y",)), 3: "int key"},
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(a, b)
    if torch.is_tensor(a):
        return torch.equal(a, b)
    return bool(a == b)


@pytest.mark.parametrize("key", STATE)
def test_states_survive_a_file_that_loads_without_code(key: str, tmp_path: Path) -> None:
    value = {key: STATE[key]}
    torch.save(checkpoint.encode(value), tmp_path / "state.pt")
    assert same(value, checkpoint.decode(torch.load(tmp_path / "state.pt", weights_only=True)))


def test_read_only_arrays_are_saved(tmp_path: Path) -> None:
    frozen = np.arange(3)
    frozen.flags.writeable = False
    assert checkpoint.decode(checkpoint.encode(frozen)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [Path("x"), {1, 2}, object(), np.array(["text"]), torch.nn.Linear(1, 1)])
def test_what_would_not_load_is_refused_when_saved(value: Any) -> None:
    with pytest.raises(UserError, match=rf"checkpoint: cannot save a {type(value).__name__} \(in hooks.0.mine\)"):
        checkpoint.encode({"hooks": [{"mine": value}]})
