"""Passes in shards: the same numbers whatever shards are found; the identity of the weights in the fingerprint."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import dataflex
from dataflex.data.pool import Pool
from dataflex.engine.folder.identity import bits_digest, weights_identity
from dataflex.scoring.decide.table import ArrayTable, ShardTable, whole
from dataflex.scoring.kept.probe import Probe
from dataflex.scoring.kept.sharded import ScoringPasses
from dataflex.scoring.progress import counted, duration, size
from dataflex.utils import dist, room, run_lock
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.distributed import run_ranks

HOW: dict[str, Any] = {"proj_dim": 64, "seed": 3, "adam": "adam_less"}
STAGES = (0, 3)


def engine_at(stage: int, steps: int) -> Any:
    world = dist.world_size()
    engine = dataflex.initialize(
        model=tiny.model("lora", targets=tiny.FEW_TARGETS),
        config=tiny.ds_config(stage, micro_batch=4 // world),
        dataflex={"train_step": 8, "scoring_batch_tokens": 60},
        train_dataset=tiny.samples(22, seed=9),
        tokenizer=tiny.PadZero(),
    )
    batches = engine.batches()
    for _ in range(steps):
        engine.training_step(next(batches))
    return engine


def score(features: torch.Tensor) -> torch.Tensor:
    return torch.stack([features[:, 0] - features[:, 1], features[:, 2]], dim=1)


def shown(table: Any) -> Any:
    """All rows of a pass's table, on every rank."""
    assert (table is not None) or not dist.is_main()
    return dist.broadcast_object(None if table is None else whole(table).tolist())


def everything(folder: str) -> dict[str, Any]:
    """Scores of every way to run a pass, and identities of several states, by stage."""
    return {str(stage): _stage(stage, Path(folder)) for stage in STAGES}


def _stage(stage: int, folder: Path) -> dict[str, Any]:
    engine = engine_at(stage, 0)
    before = weights_identity(engine.engine, "base", True)
    engine = engine_at(stage, 2)
    pool = engine.run.pool
    parts = weights_identity(engine.engine, "base", True)

    def passes(name: str | None, **more: Any) -> ScoringPasses:
        where = None if name is None else folder / f"{name}{stage}"
        return ScoringPasses(where, "less", lambda moments: weights_identity(engine.engine, "base", moments), 5, **more)

    def scores(found: ScoringPasses) -> Any:
        return shown(found.gradient_table(engine.scorer, pool, score, 2, target="t", **HOW))

    result: dict[str, Any] = {"identity": [before, parts], "nothing kept": scores(passes(None))}
    result["kept"] = scores(passes("scores"))
    dist.barrier()
    if dist.is_main():
        for broken in (folder / f"scores{stage}").glob("scores/*/scores-0000[13].npy"):
            broken.unlink()
    dist.barrier()
    result["mended"] = scores(passes("scores"))
    features = [scores(passes("features", keep_features=True)) for _ in range(2)]
    result["features"], result["features again"] = features
    result["refused"] = []
    for call in (
        lambda: scores(passes(None, keep_features=True)),
        lambda: passes("exact", keep_features=True).scores(engine.scorer, pool, lambda ids: ids),
    ):
        try:
            call()
        except UserError as error:
            result["refused"].append(str(error))
    return result


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    return {
        world: run_ranks("tests.scoring.test_sharded:everything", world, folder=str(tmp_path_factory.mktemp("passes")))
        for world in (1, 2)
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_pass_gives_the_same_scores_whatever_it_finds(found: dict[int, list[dict[str, Any]]], stage: int) -> None:
    for world in (1, 2):
        for rank in found[world]:
            got = rank[str(stage)]
            assert got["kept"] == got["nothing kept"] == got["mended"] == found[world][0][str(stage)]["kept"]
            assert got["features"] == got["features again"]
            rounded = 1e-3 * np.abs(got["kept"]).max()  # features are kept in fp16, and a score is a difference of two
            np.testing.assert_allclose(got["features"], got["kept"], rtol=0, atol=rounded)
            nowhere, exact = got["refused"]
            assert "keep_features: needs output_dir" in nowhere and "keep_features: less makes no features" in exact
    one, two = (np.array(found[world][0][str(stage)]["kept"]) for world in (1, 2))
    assert one.shape == (22, 2) and np.unique(one).size == 44
    np.testing.assert_allclose(one, two, atol=1e-4 * np.abs(one).max())


@pytest.mark.parametrize("stage", STAGES)
def test_the_identity_changes_with_the_weights_and_moments_only(
    found: dict[int, list[dict[str, Any]]], stage: int
) -> None:
    for world in (1, 2):
        ranks = [rank[str(stage)]["identity"] for rank in found[world]]
        assert ranks == [ranks[0]] * world
    before, after = found[1][0][str(stage)]["identity"]
    assert before["base weights"] == after["base weights"]
    assert before["trained weights"] != after["trained weights"]
    assert before["Adam's moments"] == "none" and after["Adam's moments"].endswith("step 2")
    other_world, _ = found[2][0][str(stage)]["identity"]
    assert other_world["trained weights"] == before["trained weights"]
    assert before["trained weights"] == found[1][0]["0"]["identity"][0]["trained weights"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_digest_sees_every_bit_and_place(dtype: torch.dtype) -> None:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    digest = bits_digest(values)
    assert digest == bits_digest(values.clone()) == bits_digest(values.t().contiguous().t())
    swapped = values.clone()
    swapped[0, 0], swapped[3, 2] = values[3, 2], values[0, 0]
    negative = values.clone()
    negative[2, 2] *= -1
    assert len({digest, bits_digest(swapped), bits_digest(negative), bits_digest(values[:, :6])}) == 4


def test_a_digest_sees_places_beyond_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataflex.engine.folder.identity._CHUNK", 4)
    values = torch.arange(10.0)
    swapped = values[[4, 1, 2, 3, 0, *range(5, 10)]]  # the first of two chunks
    assert bits_digest(values) != bits_digest(swapped)


def test_words_for_people() -> None:
    assert (duration(3661.4), size(512), size(3 * 2**30)) == ("1:01:01", "512 B", "3.0 GiB")
    assert (counted(1, "batch", "es"), counted(1200, "sample")) == ("1 batch", "1,200 samples")


class OnesScorer:
    """A scorer whose features are ones; ``during`` is called while a pass is on."""

    device = torch.device("cpu")
    tally = staticmethod(lambda samples: None)

    def __init__(self, during: Callable[[], Any]) -> None:
        self.during, self.asked = during, 0

    def keep_moments(self) -> Any:
        return nullcontext()

    def gradient_features(self, dataset: Any, ids: Any, proj_dim: int, **how: Any) -> Any:
        self.asked += len(ids)
        self.during()
        return np.ones((len(ids), proj_dim), np.float32)


def test_two_runs_do_not_write_the_same_features_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = run_lock.FolderLock.take
    monkeypatch.setattr(run_lock.FolderLock, "take", lambda *args, **named: take(*args, **named, wait_s=0.05))
    pool, said = tiny.samples(12, 1), []

    def run(during: Callable[[], Any]) -> int:
        passes = ScoringPasses(
            tmp_path / "out", "less", shard_samples=4, keep_features=True, features_dir=tmp_path / "f"
        )
        scorer = OnesScorer(during)
        table = passes.gradient_table(scorer, Pool.from_datasets(pool), score, 2, target="t", proj_dim=8)
        assert shown(table) == [[0.0, 1.0]] * 12
        return scorer.asked

    def other() -> None:
        with pytest.raises(UserError) as caught:
            run(lambda: None)
        said.append(str(caught.value))

    assert run(other) == 12 and len(said) == 3
    assert re.match(
        rf"features_dir: {tmp_path}/f/\w{{16}} is in use by another run \(process {os.getpid()} on ", said[0]
    )
    assert run(other) == 0, "the second takes up what the first has written"


def test_a_pass_that_does_not_fit_on_the_disk_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=12 * 4 - 1))
    scorer = OnesScorer(lambda: pytest.fail("too late"))
    passes = ScoringPasses(tmp_path, "loss", shard_samples=4)
    with pytest.raises(UserError, match="no room for the pass: it takes about 1 MiB, the disk at /"):
        passes.scores(scorer, Pool.from_datasets(tiny.samples(12, 1)), lambda ids: pytest.fail("too late"))


def test_rows_of_a_pass_lie_on_the_disk_and_serve_again(tmp_path: Path) -> None:
    """Three numbers for each of 11 samples, in shards of 4; in memory where there is no folder."""
    right = np.arange(33, dtype=np.float32).reshape(11, 3)
    pool, asked = Pool.from_datasets(tiny.samples(11, 1)), []

    def call(ids: Any) -> Any:
        asked.append(len(ids))
        return right[ids]

    def table(folder: Path | None, **more: Any) -> Any:
        return ScoringPasses(folder, "c", shard_samples=4, **more).table(OnesScorer(lambda: None), pool, call, 3)

    in_memory, kept, again = table(None), table(tmp_path), table(tmp_path)
    assert isinstance(in_memory, ArrayTable) and isinstance(kept, ShardTable) and asked == [4, 4, 3] * 2
    (rows,) = tmp_path.glob("scores/*/scores-00001.npy")
    assert np.load(rows, mmap_mode="r").tolist() == right[4:8].tolist()
    for found in (in_memory, kept, again):
        np.testing.assert_array_equal(whole(found), right)
        np.testing.assert_array_equal(found.rows(np.array([10, 0, 5])), right[[10, 0, 5]])
    column = ScoringPasses(tmp_path, "d", shard_samples=4).scores(
        OnesScorer(lambda: None), pool, lambda ids: right[ids, 1]
    )
    np.testing.assert_array_equal(column, right[:, 1])


def test_a_pass_that_is_only_tried_says_what_a_row_takes() -> None:
    probe = Probe()
    pool = Pool.from_datasets(tiny.samples(11, 1))
    scorer = OnesScorer(lambda: None)
    scorer.token_budget = 50  # type: ignore[attr-defined]
    passes = ScoringPasses(shard_samples=4, probe=probe)
    assert passes.table(scorer, pool, lambda ids: np.ones((len(ids), 3)), 3) is None  # type: ignore[arg-type]
    assert probe.row_bytes == 12 and probe.samples > 0
    assert passes.scores(scorer, pool, lambda ids: np.ones(len(ids))).tolist() == [0.0] * 11  # type: ignore[arg-type]
