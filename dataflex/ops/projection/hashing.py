"""Counter-based random bits (Philox4x32-10) and the projections' signs and buckets.

Every bit is a function of (seed, tensor id, global row, global column, output), so that a feature does not depend
on batch, padding, sharding or the order of the layers.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Integer arithmetic on int64
tensors, so that every device gives the same bits.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_SIGN_STREAM = 0x51515151
_BUCKET_STREAM = 0x4B4B4B4B
_COUNT_STREAM = 0x43434343
_SPARSE_STREAM = 0x53535353
_LEFT_STREAM = 0x4C4C4C4C
_RIGHT_STREAM = 0x52525252
_DENSE_KEY = 0x44444444 << 32
SPARSITY = 4  # nonzeros in a column of the sjlt projection


def tensor_id(name: str) -> int:
    """A stable 32-bit id of a parameter's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def philox(counter: tuple[Tensor | int, Tensor | int, Tensor | int, int], key: int) -> tuple[Tensor, ...]:
    """Four words (int64 tensors holding 32 bits) for each broadcast counter. Ten rounds."""
    c0, c1, c2, c3 = (torch.as_tensor(c, dtype=torch.int64) for c in counter)
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def tile_shape(proj_dim: int) -> tuple[int, int]:
    """Rows and columns of the xor-fold tile, rows * columns = proj_dim. ValueError unless a power of two >= 2."""
    if proj_dim < 2 or proj_dim & (proj_dim - 1):
        raise ValueError(f"proj_dim: expected a power of two >= 2, got {proj_dim}")
    bits = proj_dim.bit_length() - 1
    rows = 1 << ((bits - 1) // 2)
    return rows, proj_dim // rows


def signs(rows: Tensor, columns: Tensor, tid: int, seed: int) -> Tensor:
    """+1 or -1, float32 [m, k], for global row numbers int64 [m] and column numbers int64 [k]."""
    blocks, block_of = torch.unique(columns >> 7, return_inverse=True)
    words = torch.stack(philox((blocks[None], rows[:, None], tid, _SIGN_STREAM), seed), dim=-1)
    word = words[:, block_of, (columns >> 5) & 3]
    return (1 - 2 * ((word >> (columns & 31)) & 1)).to(torch.float32)


def buckets(rows: Tensor, columns: Tensor, tid: int, seed: int, proj_dim: int) -> Tensor:
    """Bucket of each element, int64 [m, k]: place in its tile, xor-ed with a word of the tile."""
    tile_rows, tile_columns = tile_shape(proj_dim)
    across, tile_across = torch.unique(columns // tile_columns, return_inverse=True)
    down, tile_down = torch.unique(rows // tile_rows, return_inverse=True)
    key = philox((across[None], down[:, None], tid, _BUCKET_STREAM), seed)[0] & (proj_dim - 1)
    place = (rows % tile_rows)[:, None] * tile_columns + (columns % tile_columns)[None]
    return place ^ key[tile_down[:, None], tile_across[None]]


def _sign_and_bucket(word: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """+1 or -1 (float32) from the lowest bit, and a bucket below ``size`` from the other 31."""
    return (1 - 2 * (word & 1)).to(torch.float32), ((word >> 1) * size) >> 31


def count_buckets(rows: Tensor, columns: Tensor, tid: int, seed: int, proj_dim: int) -> tuple[Tensor, Tensor]:
    """Signs and buckets of a count sketch, each [m, k]: word j mod 4 of counter (j div 4, i)."""
    words = torch.stack(philox(((columns >> 2)[None], rows[:, None], tid, _COUNT_STREAM), seed), dim=-1)
    which = (columns & 3)[None, :, None].expand(len(rows), -1, 1)
    return _sign_and_bucket(words.gather(2, which)[..., 0], proj_dim)


def sparse_buckets(rows: Tensor, columns: Tensor, tid: int, seed: int, proj_dim: int) -> tuple[Tensor, Tensor]:
    """Signs and buckets of a sparse Johnson-Lindenstrauss transform, each [4, m, k]: one bucket in each quarter.

    Word q of counter (j, i) is for quarter q.
    """
    words = torch.stack(philox((columns[None], rows[:, None], tid, _SPARSE_STREAM), seed))
    sign, bucket = _sign_and_bucket(words, proj_dim // SPARSITY)
    return sign, bucket + (torch.arange(SPARSITY, device=bucket.device) * (proj_dim // SPARSITY))[:, None, None]


def _expand_bits(words: tuple[Tensor, ...], count: int) -> Tensor:
    """Four words for each run of 128 outputs, [..., ceil(count / 128)], to +1 or -1, float32 [..., count]."""
    each = torch.stack(words, dim=-1)[..., None] >> torch.arange(32, device=words[0].device)
    return (1 - 2 * (each & 1)).flatten(-3)[..., :count].to(torch.float32)


def dense_signs(rows: Tensor, columns: Tensor, tid: int, seed: int, proj_dim: int) -> Tensor:
    """+1 or -1, float32 [m, k, proj_dim]: bit p mod 128 of counter (p div 128, j, i, tid) under a key of its own."""
    runs = torch.arange((proj_dim + 127) // 128, device=rows.device)
    counter = (runs[None, None], columns[None, :, None], rows[:, None, None], tid)
    return _expand_bits(philox(counter, seed ^ _DENSE_KEY), proj_dim)


def factor_signs(index: Tensor, tid: int, seed: int, size: int, left: bool) -> Tensor:
    """One factor of the Kronecker projection: +1 or -1, float32 [n, size], for global row or column numbers [n]."""
    runs = torch.arange((size + 127) // 128, device=index.device)
    stream = _LEFT_STREAM if left else _RIGHT_STREAM
    return _expand_bits(philox((runs[None], index[:, None], tid, stream), seed), size)
