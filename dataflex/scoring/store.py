"""Results of scoring passes in shards on disk: written whole or not at all, checked, memory-mapped, resumable.

A store is a folder with ``manifest.json`` and one ``<name>-<shard>.npy`` for each array of each shard. A shard holds
the results of a fixed range of the samples and counts once the manifest names it, with sizes and sha256. The manifest
also holds the fingerprint: what the results were made from, part by part. Rank 0 writes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.scoring.batches import Ids
from dataflex.utils.errors import UserError
from dataflex.utils.files import sha256_of, write_atomically
from dataflex.utils.logging import logger

MANIFEST = "manifest.json"
FORMAT = 1
DEFAULT_SHARD = 4096

Parts = Mapping[str, str]


def digest_of(parts: Parts) -> str:
    """16 hexadecimal digits over a fingerprint's parts; the name of a store's folder."""
    return hashlib.sha256(json.dumps(dict(sorted(parts.items()))).encode()).hexdigest()[:16]


def ids_part(ids: Ids, pool_size: int) -> str:
    """The part of a fingerprint that says which samples of the pool were scored, and in which order."""
    if len(ids) == pool_size and np.array_equal(ids, np.arange(pool_size)):
        return f"all {pool_size}"
    return f"{len(ids)}: {hashlib.sha256(ids.astype('<i8').tobytes()).hexdigest()[:16]}"


def differing(found: Parts, wanted: Parts) -> list[str]:
    """Names of the parts in which two fingerprints differ."""
    return sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))


class ShardStore:
    """The shards of one pass. folder: its own. parts: the fingerprint. ids: int64 [n], the samples in order.

    shard_samples: samples of a shard, the last one may have fewer.
    """

    def __init__(self, folder: Path, parts: Parts, ids: Ids, shard_samples: int = DEFAULT_SHARD) -> None:
        assert shard_samples > 0 and len(ids) > 0
        self.folder, self.ids, self.shard_samples = folder, ids, shard_samples
        self.parts = {**parts, "shard": f"{shard_samples} samples"}
        self.shards: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        """Number of shards of the whole pass."""
        return -(-len(self.ids) // self.shard_samples)

    def places(self, index: int) -> slice:
        """The positions in ``ids`` that shard ``index`` holds."""
        start = index * self.shard_samples
        return slice(start, min(start + self.shard_samples, len(self.ids)))

    @property
    def complete(self) -> bool:
        return len(self.shards) == len(self)

    def resume(self) -> None:
        """Find the whole shards of an earlier pass; of another fingerprint, or broken: say so and leave them out."""
        manifest = read_manifest(self.folder)
        if manifest is None:
            return
        others = differing(manifest["fingerprint"], self.parts)
        if others:
            logger.warning(f"{self.folder}: not used and written anew, since it differs in {', '.join(others)}")
            return
        for key, shard in manifest["shards"].items():
            problem = broken_shard(self.folder, shard)
            if problem is None:
                self.shards[int(key)] = shard
            else:
                logger.warning(f"{self.folder}: shard {key} is made anew: {problem}")

    def write(self, index: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Put a shard's arrays on disk, then into the manifest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        where = self.places(index)
        ids = self.ids[where]
        files = {name: _write_array(self.folder / f"{name}-{index:05d}.npy", array) for name, array in arrays.items()}
        self.shards[index] = {
            "samples": [where.start, where.stop],
            "ids": [int(ids.min()), int(ids.max())],
            "files": files,
        }
        content = {
            "format": FORMAT,
            "fingerprint": self.parts,
            "count": len(self.ids),
            "shard_samples": self.shard_samples,
            "shards": {str(k): self.shards[k] for k in sorted(self.shards)},
        }
        write_atomically(self.folder / MANIFEST, json.dumps(content, indent=1))

    def read(self, index: int, name: str) -> NDArray[Any]:
        """An array of a whole shard, memory-mapped."""
        return _map(self.folder, self.shards[index], name)


def folder_for(parent: Path, parts: Parts, shard_samples: int) -> Path:
    """The folder of a fingerprint's store in ``parent``.

    Where it is not there yet, but others are, the nearest one and what differs in it is said.
    """
    wanted = {**parts, "shard": f"{shard_samples} samples"}
    folder = parent / digest_of(wanted)
    if folder.exists() or not parent.is_dir():
        return folder
    manifests = [(other, read_manifest(other)) for other in sorted(parent.iterdir()) if other.is_dir()]
    found = [(differing(m["fingerprint"], wanted), other) for other, m in manifests if m is not None]
    if found:
        names, other = min(found, key=lambda pair: len(pair[0]))
        logger.info(f"{other}: not used, it differs in {', '.join(names)}")
    return folder


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a store; None, and a warning, where it cannot be read; None where there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT and bool(manifest["fingerprint"]) and manifest["shards"] is not None
    except (ValueError, KeyError, TypeError) as error:
        logger.warning(f"{path}: cannot be read ({type(error).__name__}), so the store is not used")
        return None
    if not known:
        logger.warning(f"{path}: has another format than {FORMAT}, so the store is not used")
        return None
    return manifest


def broken_shard(folder: Path, shard: Mapping[str, Any]) -> str | None:
    """Why a shard is not as it was written, or None if it is; reads it whole."""
    for entry in shard["files"].values():
        path = folder / entry["file"]
        if not path.is_file():
            return f"{entry['file']} is missing"
        if path.stat().st_size != entry["size"] or sha256_of(path) != entry["sha256"]:
            return f"{entry['file']} differs from what was written"
    return None


class StoreReader:
    """A whole store as it lies on disk, whatever it was made from. UserError where there is none, or not all of it.

    check: read everything once and compare it with its checksums.
    """

    def __init__(self, folder: Path, *, check: bool = True) -> None:
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder}: holds no store (no {MANIFEST}); valid: a folder that a scoring pass wrote")
        self.folder = folder
        self.parts: dict[str, str] = manifest["fingerprint"]
        self.count: int = manifest["count"]
        self.shard_samples: int = manifest["shard_samples"]
        self.shards: list[dict[str, Any]] = [manifest["shards"][k] for k in sorted(manifest["shards"], key=int)]
        expected = -(-self.count // self.shard_samples)
        if len(self.shards) != expected:
            raise UserError(f"{folder}: holds {len(self.shards)} of {expected} shards; run its scoring pass to the end")
        for shard in self.shards if check else ():
            problem = broken_shard(folder, shard)
            if problem:
                raise UserError(f"{folder}: {problem}; remove the folder and score again")

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, index: int, name: str) -> NDArray[Any]:
        """An array of shard ``index``, memory-mapped."""
        if name not in self.shards[index]["files"]:
            raise UserError(f"{self.folder}: holds no {name}, but {', '.join(self.shards[index]['files'])}")
        return _map(self.folder, self.shards[index], name)

    def rows(self, name: str, places: Ids) -> NDArray[Any]:
        """The rows at positions ``places`` [k], in that order, read from their shards: [k, ...]."""
        shard, row = np.divmod(places, self.shard_samples)
        first = self.read(0, name)
        out = np.empty((len(places), *first.shape[1:]), dtype=first.dtype)
        for index in np.unique(shard):
            mine = np.flatnonzero(shard == index)
            out[mine] = self.read(int(index), name)[row[mine]]
        return out


def _map(folder: Path, shard: Mapping[str, Any], name: str) -> NDArray[Any]:
    array: NDArray[Any] = np.load(folder / shard["files"][name]["file"], mmap_mode="r", allow_pickle=False)
    return array


def _write_array(path: Path, array: NDArray[Any]) -> dict[str, Any]:
    """Write through a temporary file, fsync and rename; what the manifest says of the file."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as handle:
        np.save(handle, array, allow_pickle=False)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    return {"file": path.name, "size": path.stat().st_size, "sha256": sha256_of(path)}
