"""Permutations that are evaluated at single positions, so that a draw from a huge domain costs what it draws.

A Feistel network on the smallest even number of bits that holds the domain is a bijection of that range, whatever its
round function is; walking its cycle until the value lies in the domain makes it one of the domain (Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataflex.core.plan import Ids, generator

Keys = NDArray[np.uint64]
ROUNDS = 6
_GOLDEN, _FIRST, _SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(values: Keys) -> Keys:
    """The finaliser of splitmix64: every bit of the result depends on every bit of ``values``."""
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))


def _feistel(values: Keys, half: Keys, keys: Keys) -> Keys:
    """One pass of ``values`` [n] < 4 ** half through the network of ``keys`` [n]."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for _ in range(ROUNDS):
        keys = keys + _GOLDEN
        left, right = right, left ^ (_mix(right ^ _mix(keys)) & mask)
    return (left << half) | right


def permuted(positions: Ids, sizes: Ids, keys: Keys) -> Ids:
    """For each i the value at ``positions[i]`` of the permutation of range(sizes[i]) that ``keys[i]`` stands for.

    positions, sizes: int64 [n], 0 <= position < size. Costs about as much as n positions, whatever the sizes.
    """
    assert positions.shape == sizes.shape == keys.shape
    bits = np.ceil(np.log2(np.maximum(sizes, 2))).astype(np.int64)
    bits += (np.int64(1) << bits) < sizes  # log2 of a float64 may round down
    half = ((bits + 1) // 2).astype(np.uint64)
    values = _feistel(positions.astype(np.uint64), half, keys)
    outside = np.flatnonzero(values >= sizes.astype(np.uint64))
    while outside.size:
        values[outside] = _feistel(values[outside], half[outside], keys[outside])
        outside = outside[values[outside] >= sizes[outside].astype(np.uint64)]
    return values.astype(np.int64)


def domain_stream(domains: Ids, positions: Ids, sizes: Ids, seed: int) -> Ids:
    """Places inside their domains, int64 [n], at ``positions`` of the domains' endless streams of permutations.

    domains: int64 [n]. sizes: int64 [K], samples of each domain. Positions size * e to size * (e + 1) are epoch e of
    a domain: every sample comes once before any comes twice.
    """
    size = sizes[domains]
    epochs, offsets = np.divmod(positions, size)
    start = generator(seed, "domain stream").integers(2**64, size=1, dtype=np.uint64)
    keys = _mix(_mix(start + domains.astype(np.uint64) * _GOLDEN) + epochs.astype(np.uint64) * _GOLDEN)
    return permuted(offsets, size, keys)
