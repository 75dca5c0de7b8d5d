"""TSDS's probabilities against a plain loop of the paper's algorithm, and what they must be at its ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dataflex.scoring.decide.neighbours import Neighbours, nearest
from dataflex.scoring.decide.tsds import density, probabilities
from dataflex.scoring.kept.vectors import Vectors
from tests.scoring.test_neighbours import in_float64, unit

CPU = torch.device("cpu")
N, M, K = 300, 10, 30


def clusters(pool: int = N, targets: int = M) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around five centres, so that some have near-duplicates and others none."""
    draw = np.random.default_rng(3)
    centres = draw.normal(size=(5, 16))
    return tuple(  # type: ignore[return-value]
        unit(centres[draw.integers(0, 5, n)] + draw.uniform(0.05, 0.6, (n, 1)) * draw.normal(size=(n, 16)))
        for n in (pool, targets)
    )


def plainly(ids: np.ndarray, d: np.ndarray, rho: np.ndarray, size: int, alpha: float, c: float) -> np.ndarray:
    """The algorithm with a search for the smallest s at every step and no clever bookkeeping."""
    targets, most = d.shape
    at, last, stopped = [0] * targets, [0] * targets, [False] * targets
    cost = np.zeros(targets)

    def reach(j: int) -> float:
        return sum(1 / rho[j, r] for r in range(at[j] + 1))

    s = 1.0
    while not all(stopped):
        j = min((j for j in range(targets) if not stopped[j]), key=lambda j: (reach(j), at[j], j))
        s = reach(j)
        cost[j] = sum((d[j, at[j] + 1] - d[j, r]) / rho[j, r] for r in range(at[j] + 1))
        if alpha / c * cost.sum() >= (1 - alpha) * targets:
            break
        last[j] = at[j]
        if at[j] < most - 2:
            at[j] += 1
        else:
            stopped[j] = True
    p = np.zeros(size)
    for j in range(targets):
        left = 1 / targets
        for r in range(last[j] + 1):
            given = min(left, 1 / (targets * s * rho[j, r]))
            p[ids[j, r]] += given
            left -= given
        p[ids[j, last[j] + 1]] += left
    return p


def densities(vectors: np.ndarray, ids: np.ndarray, most: int, sigma: float) -> np.ndarray:
    """Kernel sums in float64, by pairs."""
    rows = vectors[ids].astype(np.float64)
    squared = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    kernel = np.maximum(0, 1 - squared / sigma**2)
    return np.sort(kernel, axis=1)[:, ::-1][:, :most].sum(axis=1)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 0.99, 0.995, 0.999, 1.0])
@pytest.mark.parametrize(("sigma", "kde_k"), [(0.75, 30), (1.2, 5), (0.0, 30)])
def test_they_are_those_of_the_plain_loop(alpha: float, sigma: float, kde_k: int) -> None:
    vectors, targets = clusters()
    shared = Vectors.of(vectors, 64)
    near = nearest(shared, targets, K, CPU)
    union = np.unique(near.ids)
    dense = density(shared, union, kde_k, sigma, CPU)
    ids, distances = in_float64(vectors, targets)
    want = densities(vectors, union, kde_k, sigma) if sigma else np.ones(len(union))
    np.testing.assert_allclose(dense, want, rtol=1e-5)
    found = probabilities(near, dense[np.searchsorted(union, near.ids)], N, alpha=alpha, c=5.0)
    rho = want[np.searchsorted(union, ids[:, :K])]
    np.testing.assert_allclose(found, plainly(ids[:, :K], distances[:, :K], rho, N, alpha, 5.0), atol=1e-6)
    assert abs(found.sum() - 1) < 1e-12 and (found >= 0).all() and found.dtype == np.float64


def test_closeness_alone_takes_the_nearest_and_breadth_alone_spreads_evenly() -> None:
    vectors, targets = clusters()
    near = nearest(Vectors.of(vectors), targets, K, CPU)
    ones = np.ones(near.ids.shape)
    closest = probabilities(near, ones, N, alpha=1.0, c=5.0)
    assert (closest == np.bincount(near.ids[:, 0], minlength=N) / M).all()
    widest = probabilities(near, ones, N, alpha=0.0, c=5.0)
    # The last neighbour is kept for what is left over, which is nothing.
    np.testing.assert_allclose(widest, np.bincount(near.ids[:, :-1].ravel(), minlength=N) / (M * (K - 1)), atol=1e-12)
    between = [
        (probabilities(near, ones, N, alpha=alpha, c=5.0) > 0).sum() for alpha in (0.9999, 0.999, 0.99, 0.9, 0.0)
    ]
    assert between == sorted(between) and between[0] < between[-1]


def test_ten_copies_share_the_mass_of_one() -> None:
    """Of two samples at the same distance from the target, one is there ten times."""
    vectors = np.array([[0.8, 0.6], *[[0.8, -0.6]] * 10, *[[-1.0, 0.0]] * 30], dtype=np.float32)
    shared, target = Vectors.of(vectors), np.array([[1.0, 0.0]], dtype=np.float32)
    near = nearest(shared, target, 12, CPU)
    assert near.ids[0].tolist() == list(range(12))
    union = np.unique(near.ids)
    dense = density(shared, union, 12, 0.5, CPU)
    np.testing.assert_allclose(dense, [1, *[10] * 10, 1], rtol=1e-5)
    found = probabilities(near, dense[np.searchsorted(union, near.ids)], 41, alpha=0.0, c=5.0)
    assert found[0] == pytest.approx(0.5, abs=1e-6) and found[1:11].sum() == pytest.approx(0.5, abs=1e-6)
    alone = probabilities(near, np.ones(near.ids.shape), 41, alpha=0.0, c=5.0)
    assert alone[1:11].sum() == pytest.approx(10 / 11, abs=1e-6)


def test_a_target_that_is_never_reached_gives_its_nearest_all() -> None:
    """The first target's candidates have a density of 4, so that s is 1/4 where the cost of going on ends it."""
    near = Neighbours(np.array([[0, 1], [2, 3]]), np.array([[0.0, 2.0], [0.0, 2.0]]))
    found = probabilities(near, np.array([[4.0, 1.0], [1.0, 1.0]]), 5, alpha=0.999, c=5.0)
    assert found.tolist() == [0.5, 0.0, 0.5, 0.0, 0.0]
