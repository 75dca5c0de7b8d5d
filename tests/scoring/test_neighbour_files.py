"""Files of an offline selection: what is written is read, and another file is refused in one line that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.scoring.kept import neighbour_files as files
from dataflex.utils.errors import UserError

IDS = np.array([[3, 0, 4], [1, 2, 0]])
SHARES = np.array([0.5, 0.0, 0.25, 0.25, 0.0])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = files.write_top_indices(tmp_path / "new", IDS)
    found = np.load(path)
    assert path.name == "top_indices.npy" and found.dtype == np.int64 and (found == IDS).all()
    assert (files.read_top_indices(path, 5) == IDS).all()
    path = files.write_probabilities(tmp_path, SHARES)
    found = np.load(path)
    assert path.name == "tsds_probs.npy" and found.dtype == np.float64 and (found == SHARES).all()
    assert (files.read_probabilities(path, 5) == SHARES).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "tsds_probs.npy"], "nothing is left beside it"


def test_narrower_numbers_of_other_tools_are_taken(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", IDS.astype(np.int32))
    np.save(tmp_path / "shares.npy", np.full(3000, 1 / 3000, dtype=np.float32))
    assert files.read_top_indices(tmp_path / "ids.npy", 5).dtype == np.int64
    assert abs(files.read_probabilities(tmp_path / "shares.npy", 3000).sum() - 1) < 1e-12


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (IDS.astype(np.float64), r"holds float64 \(2, 3\); valid: int \[targets, neighbours\]"),
        (IDS[0], r"holds int64 \(3,\); valid"),
        (IDS[:, :0], r"holds int64 \(2, 0\); valid"),
        (IDS - 1, "has the sample id -1; valid: 0 to 4"),
        (IDS + 1, "has the sample id 5; valid: 0 to 4"),
        (np.array([[1, 2], [3, 3]]), "row 1 names a sample twice"),
    ],
)
def test_ids_that_are_none_are_refused(tmp_path: Path, array: Any, words: str) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UserError, match=f"x.npy: {words}"):
        files.read_top_indices(tmp_path / "x.npy", 5)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (SHARES[:4], "has 4 probabilities; valid: one for each of 5 samples"),
        (SHARES - 0.1, "the probability of sample 1 is -0.1; valid: numbers >= 0"),
        (np.where(SHARES > 0.4, np.nan, SHARES), "the probability of sample 0 is nan"),
        (SHARES * 2, "the probabilities sum to 2; valid: 1"),
        (IDS, r"holds int64 \(2, 3\); valid: float \[samples\]"),
    ],
)
def test_probabilities_that_are_none_are_refused(tmp_path: Path, array: Any, words: str) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UserError, match=f"x.npy: {words}"):
        files.read_probabilities(tmp_path / "x.npy", 5)


def test_what_is_no_array_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_text("[[1, 2]]")
    for path in (tmp_path / "x.npy", tmp_path / "missing.npy"):
        with pytest.raises(UserError, match=f"{path.name}: cannot be read as a .npy file"):
            files.read_top_indices(path, 5)
