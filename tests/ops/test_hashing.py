"""The random bits behind the projection: known answers, balance, and no collision inside a tile."""

from __future__ import annotations

import pytest
import torch

from dataflex.ops.projection.hashing import buckets, philox, signs, tensor_id, tile_shape

ALL_ONES = 0xFFFFFFFF


def words(counter: tuple[int, int, int, int], key: int) -> list[str]:
    return [f"{int(word):08x}" for word in philox(counter, key)]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ALL_ONES,) * 4, (ALL_ONES << 32) | ALL_ONES, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0x299F31D0 << 32) | 0xA4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, int, int, int], key: int, answer: str) -> None:
    """From the authors' Random123 distribution, kat_vectors, philox4x32 with 10 rounds."""
    assert words(counter, key) == answer.split()


def test_philox_over_tensors_equals_philox_one_by_one() -> None:
    first, second = torch.tensor([[0, 7, ALL_ONES]]), torch.tensor([[3], [4]])
    got = torch.stack(philox((first, second, 11, 12), 99))
    assert got.shape == (4, 2, 3)
    for r in range(2):
        for c in range(3):
            one = philox((int(first[0, c]), int(second[r, 0]), 11, 12), 99)
            assert got[:, r, c].tolist() == [int(word) for word in one]


@pytest.mark.parametrize("proj_dim", [2, 4, 32, 512, 2048, 8192])
def test_tiles_hold_proj_dim_elements(proj_dim: int) -> None:
    rows, columns = tile_shape(proj_dim)
    assert rows * columns == proj_dim and rows <= columns
    assert {512: (16, 32), 2048: (32, 64), 8192: (64, 128)}.get(proj_dim, (rows, columns)) == (rows, columns)


@pytest.mark.parametrize("proj_dim", [0, 1, 3, 768, -8])
def test_other_sizes_are_refused(proj_dim: int) -> None:
    with pytest.raises(ValueError, match=f"proj_dim: expected a power of two >= 2, got {proj_dim}"):
        tile_shape(proj_dim)


@pytest.mark.parametrize("proj_dim", [8, 512, 2048])
def test_elements_of_a_tile_fall_into_distinct_buckets(proj_dim: int) -> None:
    rows, columns = tile_shape(proj_dim)
    place = buckets(torch.arange(3 * rows), torch.arange(2 * columns), 5, 17, proj_dim)
    keys = []
    for r in range(3):
        for c in range(2):
            tile = place[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns]
            assert sorted(tile.flatten().tolist()) == list(range(proj_dim))
            keys.append(int(tile[0, 0]))
    if proj_dim > 8:
        assert len(set(keys)) > 1, "every tile has a word of its own"


def test_signs_are_balanced_and_uncorrelated() -> None:
    rows, columns = torch.arange(300), torch.arange(500)
    sign = signs(rows, columns, tid=3, seed=1)
    n = sign.numel()
    assert set(sign.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(sign.mean())) < 4 / n**0.5
    for other in (signs(rows, columns, 3, 2), signs(rows, columns, 4, 1), sign.roll(1, 0), sign.roll(1, 1)):
        assert abs(float((sign * other).mean())) < 4 / n**0.5


def test_signs_and_buckets_belong_to_global_rows_and_columns() -> None:
    rows, columns = torch.arange(200), torch.arange(300)
    part_rows, part_columns = torch.arange(37, 91), torch.tensor([299, 5, 128, 127, 130])
    for hashed in (lambda r, c: signs(r, c, 9, 4), lambda r, c: buckets(r, c, 9, 4, 512)):
        whole = hashed(rows, columns)
        assert torch.equal(hashed(part_rows, part_columns), whole[part_rows][:, part_columns])


def test_tensor_ids_are_stable_and_distinct() -> None:
    names = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(80) for p in "qkvo"]
    ids = [tensor_id(name) for name in names]
    assert len(set(ids)) == len(names)
    assert all(0 <= i < 1 << 32 for i in ids)
    assert tensor_id("lm_head.weight") == tensor_id("lm_head.weight") == 0x6CFD0FAE
