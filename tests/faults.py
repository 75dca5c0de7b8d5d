"""Damage for the tests of files: flipped bits, cut ends, and what a reader may say to them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path


def bit_flips(path: Path, most: int | None = None, seed: int = 0) -> Iterator[Path]:
    """``path`` with each of its bits flipped in turn (or ``most`` of them, drawn at random); whole again at the end."""
    whole = path.read_bytes()
    places = range(8 * len(whole))
    chosen = places if most is None or most >= len(places) else random.Random(seed).sample(places, most)
    try:
        for place in chosen:
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            path.write_bytes(damaged)
            yield path
    finally:
        path.write_bytes(whole)
