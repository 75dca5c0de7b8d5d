"""Results of scoring passes in shards on disk: written whole or not at all, checked, memory-mapped, resumable.

A store is a folder with ``manifest.json`` and one ``<name>-<shard>.npy`` for each array of each shard. A shard holds
the results of a fixed range of the samples and counts once the manifest names it, with sizes and sha256. The manifest
also holds the fingerprint: what the results were made from, part by part. Rank 0 writes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex.scoring.batches import Ids
from dataflex.utils.errors import UserError, listed
from dataflex.utils.logging import logger
from dataflex.utils.records import DamagedError, FileRecord, InnerPath, Record, read_sealed, write_sealed

MANIFEST = "manifest.json"
DEFAULT_SHARD = 4096

Parts = Mapping[str, str]
Pair = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


class ArrayRecord(FileRecord):
    """A .npy file of a shard; file: its name."""

    file: InnerPath


class Shard(Record):
    """samples: [first, end) places in the pass. ids: the lowest and the highest. files: by array name."""

    samples: Pair
    ids: Pair
    files: dict[str, ArrayRecord]


class Manifest(Record):
    """What a store holds: the shards that are whole, by number, and what they are made from."""

    format: Literal[2]
    fingerprint: dict[str, str]
    count: Annotated[int, Field(ge=1)]
    shard_samples: Annotated[int, Field(ge=1)]
    shards: dict[Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")], Shard]


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
        self.shards: dict[int, Shard] = {}

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

    def resume(self, *arrays: str) -> None:
        """Find the whole shards of an earlier pass; of another fingerprint, or broken: say so and leave them out.

        arrays: what each shard must hold.
        """
        manifest = read_manifest(self.folder)
        if manifest is None:
            return
        others = differing(manifest.fingerprint, self.parts)
        if others:
            logger.warning(f"{self.folder}: not used and written anew, since it differs in {', '.join(others)}")
            return
        for key, shard in manifest.shards.items():
            place = self.places(int(key))
            fits = int(key) < len(self) and shard.samples == [place.start, place.stop]
            problem = broken_shard(self.folder, shard, arrays) if fits else "it is of other samples"
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
        bounds = [int(ids.min()), int(ids.max())]
        self.shards[index] = Shard(samples=[where.start, where.stop], ids=bounds, files=files)
        content = Manifest(
            format=2,
            fingerprint=self.parts,
            count=len(self.ids),
            shard_samples=self.shard_samples,
            shards={str(k): self.shards[k] for k in sorted(self.shards)},
        )
        write_sealed(self.folder / MANIFEST, content.model_dump(mode="json"))

    def read(self, index: int, name: str) -> NDArray[Any]:
        """An array of a whole shard, memory-mapped."""
        return _map(self.folder, self.shards[index], name)


def folder_for(parent: Path, parts: Parts, shard_samples: int, say: bool = True) -> Path:
    """The folder of a fingerprint's store in ``parent``.

    Where it is not there yet, but others are, the nearest one and what differs in it is said (with ``say``).
    """
    wanted = {**parts, "shard": f"{shard_samples} samples"}
    folder = parent / digest_of(wanted)
    if folder.exists() or not parent.is_dir() or not say:
        return folder
    manifests = [(other, read_manifest(other)) for other in sorted(parent.iterdir()) if other.is_dir()]
    found = [(differing(m.fingerprint, wanted), other) for other, m in manifests if m is not None]
    if found:
        names, other = min(found, key=lambda pair: len(pair[0]))
        logger.info(f"{other}: not used, it differs in {', '.join(names)}")
    return folder


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a store; None, and a warning, where it cannot be read; None where there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return read_sealed(path, Manifest)
    except DamagedError as error:
        logger.warning(f"{folder}: {error}, so the store is not used")
        return None


def broken_shard(folder: Path, shard: Shard, arrays: Iterable[str] = ()) -> str | None:
    """Why a shard is not as it was written, or lacks one of ``arrays``; None if it is whole. Reads it whole."""
    missing = [name for name in arrays if name not in shard.files]
    if missing:
        return f"it has no {missing[0]}"
    differences = (record.differs(folder / record.file) for record in shard.files.values())
    return next((problem for problem in differences if problem), None)


class StoreReader:
    """A whole store as it lies on disk, whatever it was made from. UserError where there is none, or not all of it.

    check: read everything once and compare it with its checksums.
    """

    def __init__(self, folder: Path, *, check: bool = True) -> None:
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder}: holds no store (no {MANIFEST}); valid: a folder that a scoring pass wrote")
        self.folder = folder
        self.parts, self.count, self.shard_samples = manifest.fingerprint, manifest.count, manifest.shard_samples
        self.shards = [manifest.shards[k] for k in sorted(manifest.shards, key=int)]
        expected = -(-self.count // self.shard_samples)
        starts = [shard.samples[0] for shard in self.shards]
        if len(self.shards) != expected or starts != list(range(0, self.count, self.shard_samples)):
            raise UserError(f"{folder}: holds {len(self.shards)} of {expected} shards; run its scoring pass to the end")
        for shard in self.shards if check else ():
            problem = broken_shard(folder, shard)
            if problem:
                raise UserError(f"{folder}: {problem}; remove the folder and score again")

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def arrays(self) -> list[str]:
        """Names of what each shard holds."""
        return sorted(self.shards[0].files)

    def read(self, index: int, name: str) -> NDArray[Any]:
        """An array of shard ``index``, memory-mapped."""
        if name not in self.shards[index].files:
            raise UserError(f"{self.folder}: holds no {name}, but {listed(self.shards[index].files)}")
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


def _map(folder: Path, shard: Shard, name: str) -> NDArray[Any]:
    path = folder / shard.files[name].file
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as a .npy file ({type(error).__name__}); score again") from None
    return array


def _write_array(path: Path, array: NDArray[Any]) -> ArrayRecord:
    """Write through a temporary file, fsync and rename; what the manifest says of the file."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as handle:
        np.save(handle, array, allow_pickle=False)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    return ArrayRecord(file=path.name, **FileRecord.of(path).model_dump())
