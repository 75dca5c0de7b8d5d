"""Kept token losses: equal to float64 ones of single samples, resumed, and refused for another pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dataflex
from dataflex.data.encoding.collate import Collator
from dataflex.data.pool import Pool
from dataflex.scoring.kept.store import MANIFEST
from dataflex.scoring.kept.token_losses import TokenLossStore, write_token_losses
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.distributed import run_ranks

SHARD = 8


def _pool(seed: int = 5) -> Pool:
    return Pool.from_datasets(tiny.samples(19, seed=seed))


def keep_and_compare(folder: str) -> dict[str, Any]:
    """Write, lose one shard, write again, read; for padded and packed batches."""
    pool, result = _pool(), {}
    for name, collator in (("padded", None), ("packed", Collator(0, packing=True, cutoff_len=48))):
        engine = dataflex.initialize(
            model=tiny.model(),
            config=tiny.ds_config(3),
            dataflex={"train_step": 1, "scoring_batch_tokens": 60},
            train_dataset=pool,
            data_collator=collator,
            tokenizer=tiny.PadZero(),
        )
        where = Path(folder, name)
        write_token_losses(engine.scorer, pool, where, {"weights": "tiny"}, SHARD)
        before = {p.name: p.stat().st_mtime_ns for p in where.iterdir()}
        dist.barrier()
        if dist.is_main():
            (where / "values-00001.npy").unlink()
        dist.barrier()
        write_token_losses(engine.scorer, pool, where, {"weights": "tiny"}, SHARD)
        changed = [p.name for p in sorted(where.iterdir()) if p.stat().st_mtime_ns != before[p.name]]
        found = TokenLossStore.open(where, pool).of(np.arange(len(pool)))
        gaps = [float(np.abs(f - e).max()) for f, e in zip(found, _exact(pool), strict=True)]
        result[name] = {"changed": changed, "gap": max(gaps), "shapes": [len(f) for f in found]}
    return result


def _exact(pool: Pool) -> list[np.ndarray]:
    net = tiny.model().double().eval()
    exact = []
    for sample in (pool[i] for i in range(len(pool))):
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"][1:] + [-100])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(net(input_ids=ids).logits[0], labels, reduction="none")
        exact.append(losses.numpy())
    return exact


@pytest.mark.parametrize("world_size", [1, 2])
def test_token_losses_are_those_of_float64_single_samples(tmp_path: Path, world_size: int) -> None:
    for result in run_ranks("tests.scoring.test_token_losses:keep_and_compare", world_size, folder=str(tmp_path)):
        for case in result.values():
            assert case["gap"] < 2e-5
            assert case["shapes"] == _pool().lengths.tolist()
            assert case["changed"] == [MANIFEST, "offsets-00001.npy", "values-00001.npy"]
    store = TokenLossStore.open(tmp_path / "padded", _pool())
    assert len(store) == 19
    assert [len(x) for x in store.of([18, 0, 0])] == _pool().lengths[[18, 0, 0]].tolist()
    with pytest.raises(UserError, match="made from other data or another tokenisation .pool .*make them anew"):
        TokenLossStore.open(tmp_path / "padded", _pool(seed=6))
    with pytest.raises(UserError, match="holds no store"):
        TokenLossStore.open(tmp_path, _pool())
