"""Stores on disk: what is whole is taken up and nothing else is, whatever was killed, cut, flipped or mixed up."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.scoring.kept.store import (
    MANIFEST,
    ShardStore,
    StoreReader,
    broken_shard,
    differing,
    digest_of,
    folder_for,
    ids_part,
)
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger
from dataflex.utils.records import write_sealed
from tests.faults import bit_flips

IDS = np.arange(11, dtype=np.int64)
PARTS = {"weights": "w1", "pool": "p1"}
ROWS = np.random.default_rng(0).standard_normal((11, 6)).astype(np.float16)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logger, "handlers", [handler])
    return lines


def filled(folder: Path, upto: int = 3, **changes: Any) -> ShardStore:
    store = ShardStore(folder, PARTS | changes, IDS, 4)
    for index in range(upto):
        store.write(index, {"features": ROWS[store.places(index)]})
    return store


def resumed(folder: Path, **changes: Any) -> ShardStore:
    store = ShardStore(folder, PARTS | changes, IDS, 4)
    store.resume()
    return store


def test_rows_come_back_from_memory_maps_in_any_order(tmp_path: Path) -> None:
    assert filled(tmp_path).complete
    reader = StoreReader(tmp_path)
    assert (len(reader), reader.count) == (3, 11)
    block = reader.read(1, "features")
    assert isinstance(block, np.memmap) and np.array_equal(block, ROWS[4:8])
    places = np.array([10, 0, 5, 4, 9, 0])
    assert np.array_equal(reader.rows("features", places), ROWS[places])
    assert json.loads((tmp_path / MANIFEST).read_text())["shards"]["2"]["ids"] == [8, 10]
    assert not list(tmp_path.glob(".*")), "a temporary file was left"


def test_whole_shards_are_taken_up_and_the_rest_is_missing(tmp_path: Path, said: list[str]) -> None:
    filled(tmp_path, upto=2)
    (tmp_path / "features-00002.npy").write_bytes(b"half")  # killed before the manifest named it
    (tmp_path / ".features-00002.npy.tmp").write_bytes(b"ha")
    store = resumed(tmp_path)
    assert sorted(store.shards) == [0, 1] and not store.complete and not said
    assert np.array_equal(store.read(1, "features"), ROWS[4:8])
    with pytest.raises(UserError, match="holds 2 of 3 shards"):
        StoreReader(tmp_path)


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_broken_shard_is_made_anew(tmp_path: Path, said: list[str], how: str) -> None:
    filled(tmp_path)
    path = tmp_path / "features-00001.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(data if how == "flip" else data[:-1])
    assert sorted(resumed(tmp_path).shards) == [0, 2]
    assert len(said) == 1 and "shard 1 is made anew: features-00001.npy" in said[0]
    with pytest.raises(UserError, match="features-00001.npy .*score again"):
        StoreReader(tmp_path)
    assert len(StoreReader(tmp_path, check=False)) == 3


def test_a_shard_without_what_a_pass_reads_is_broken(tmp_path: Path) -> None:
    (_, shard), *_ = filled(tmp_path, upto=1).shards.items()
    assert broken_shard(tmp_path, shard, ["features"]) is None
    assert broken_shard(tmp_path, shard, ["features", "score"]) == "it has no score"


@pytest.mark.parametrize("part", PARTS)
def test_another_fingerprint_is_said_and_not_used(tmp_path: Path, said: list[str], part: str) -> None:
    filled(tmp_path)
    assert not resumed(tmp_path, **{part: "other"}).shards
    assert said == [f"{tmp_path}: not used and written anew, since it differs in {part}"]


def test_a_shard_that_ends_elsewhere_is_not_taken_up(tmp_path: Path, said: list[str]) -> None:
    filled(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["shards"]["1"]["samples"] = [4, 7]
    manifest.pop("seal", None)
    write_sealed(tmp_path / MANIFEST, manifest)
    assert sorted(resumed(tmp_path).shards) == [0, 2] and "shard 1 is made anew: it is of other samples" in said[0]


def test_other_shards_are_another_store(tmp_path: Path, said: list[str]) -> None:
    filled(tmp_path)
    store = ShardStore(tmp_path, PARTS, IDS, 5)
    store.resume()
    assert not store.shards and "differs in shard" in said[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 7, "fingerprint": {"a": "b"}, "shards": {}}'])
def test_a_manifest_that_cannot_be_read_is_said(tmp_path: Path, said: list[str], text: str) -> None:
    filled(tmp_path)
    (tmp_path / MANIFEST).write_text(text)
    assert not resumed(tmp_path).shards
    assert len(said) == 1 and "the store is not used" in said[0]


def test_the_nearest_other_store_is_named(tmp_path: Path, said: list[str]) -> None:
    assert folder_for(tmp_path / "none", PARTS, 4).name == digest_of({**PARTS, "shard": "4 samples"})
    for name, changes in (("far", {"weights": "w2", "pool": "p2"}), ("near", {"pool": "p2"})):
        filled(tmp_path / name, **changes)
    folder = folder_for(tmp_path, PARTS, 4)
    assert said == [f"{tmp_path / 'near'}: not used, it differs in pool"]
    filled(folder)
    assert folder_for(tmp_path, PARTS, 4) == folder and len(said) == 1


def test_names_of_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no store .no manifest.json."):
        StoreReader(tmp_path)
    filled(tmp_path)
    with pytest.raises(UserError, match="holds no scores, but features"):
        StoreReader(tmp_path).read(0, "scores")


def test_fingerprints() -> None:
    assert differing({"a": "1", "b": "2"}, {"b": "2", "a": "1"}) == []
    assert differing({"a": "1"}, {"a": "2", "c": "3"}) == ["a", "c"]
    assert digest_of({"a": "1", "b": "2"}) == digest_of({"b": "2", "a": "1"}) != digest_of({"a": "1"})
    assert ids_part(IDS, 11) == "all 11"
    assert ids_part(IDS, 12) != ids_part(IDS[::-1].copy(), 12) != ids_part(IDS[:-1], 12)


def test_a_flipped_bit_in_a_manifest_is_seen(tmp_path: Path, said: list[str]) -> None:
    filled(tmp_path)
    _every_flip(tmp_path, 500)


@pytest.mark.slow
def test_every_bit_of_a_manifest(tmp_path: Path, said: list[str]) -> None:
    filled(tmp_path)
    assert _every_flip(tmp_path, None) > 0.99 * 8 * (tmp_path / MANIFEST).stat().st_size


def _every_flip(folder: Path, most: int | None) -> int:
    """Flip bits of the manifest; a store is then either not used or the same. How many were seen."""
    seen = 0
    for _ in bit_flips(folder / MANIFEST, most):
        shards = resumed(folder).shards
        assert sorted(shards) in ([], [0, 1, 2])
        if shards:
            assert np.array_equal(StoreReader(folder).rows("features", IDS), ROWS)
            continue
        seen += 1
        with pytest.raises(UserError, match="holds no store"):
            StoreReader(folder)
    assert sorted(resumed(folder).shards) == [0, 1, 2]
    return seen


FORGED: dict[str, dict[str, Any]] = {
    "no shards": {"shards": {}},
    "another shard": {"shards": {"7": {"samples": [28, 32], "ids": [28, 31], "files": {}}}},
    "other samples": {"shards": {"0": {"samples": [0, 5], "ids": [0, 4], "files": {}}}},
    "no files": {"shards": {"0": {"samples": [0, 4], "ids": [0, 3], "files": {}}}},
    "no samples": {"count": 0},
    "shards of nothing": {"shard_samples": 0},
}


@pytest.mark.parametrize("case", FORGED)
def test_a_manifest_with_a_right_seal_is_held_against_the_pass(tmp_path: Path, said: list[str], case: str) -> None:
    filled(tmp_path)
    content = json.loads((tmp_path / MANIFEST).read_text())
    del content["seal"]
    write_sealed(tmp_path / MANIFEST, content | FORGED[case])
    store = ShardStore(tmp_path, PARTS, IDS, 4)
    store.resume("features")
    assert not store.shards
    with pytest.raises(UserError):
        StoreReader(tmp_path)
