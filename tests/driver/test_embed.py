"""`dataflex-cli embed`: neighbours and probabilities against embeddings made by hand, and what is chosen by them."""

from __future__ import annotations

import json
import logging
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModel

from dataflex.config import load_config
from dataflex.core.clock import Clock
from dataflex.data.load import load_data
from dataflex.driver import embedding, scores
from dataflex.driver.selecting import select
from dataflex.engine.models.model import load_tokenizer
from dataflex.scoring.decide.table import ArrayTable
from dataflex.scoring.decide.tsds import pool_probabilities
from dataflex.scoring.decide.vector_table import VectorTable
from dataflex.scoring.kept.store import StoreReader
from dataflex.scoring.kept.vectors import Vectors
from dataflex.train.selector.embeddings import Embedded
from dataflex.train.selector.target_selector import in_turns
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger
from tests.distributed import run_ranks
from tests.driver.workspace import make_model, settings

Wide = np.ndarray
EMBED: dict[str, Any] = {
    "deepspeed": "ds_zero2.json",
    "eval_dataset": "target",
    "train_type": "dynamic_select",
    "component_name": "near",
    "update_step": 1000,
    "max_steps": None,
    "score_shard_samples": 24,
    "scoring_batch_tokens": 256,
}
TSDS = {"kde_k": 5, "sigma": 0.3, "alpha": 0.4}


def keys(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    return settings(folder, **{**EMBED, "output_dir": str(folder / name), **changes})


def _cases(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """All but `near` look through another model, so that those with `bare`, which has no weights, must not load it."""

    def case(name: str, command: str = "embed", **changes: Any) -> tuple[str, dict[str, Any]]:
        return command, keys(folder, name, **{"model_name_or_path": str(folder / "bare"), **changes})

    def other(component: str = "near", **params: Any) -> dict[str, Any]:
        params |= {"embedding_model": str(folder / "other")}
        return {"component_name": component, "component_params": {"select": params}}

    with_model = {"model_name_or_path": str(folder / "model")}
    mixed = {"train_type": ["dynamic_select", "dynamic_mix"], "mixer_eval_dataset": "target"}
    both = {"component_name": {"select": "near", "mix": "odm"}, **mixed}
    return {
        "near": case("near", embed_neighbours=64, **with_model),
        "again": case("near", "score", **with_model),
        "dry": case("dry", dry_run=True, **other(aggregate="vote")),
        "limited": case("limited", resume_from_checkpoint=True, **{**other(max_neighbours=9), **both}),
        "tsds": case("tsds", **other("tsds", **TSDS)),
        "held": case("held", val_size=8, eval_dataset=None, **other()),
        "rds": case("rds", eval_dataset="target,b", **other("rds")),
        "score": case("scored", "score", eval_dataset="target,b", **other("rds")),
        "moved": case("moved", **other()),
        "score moved": case("moved", "score", dataset=["b", "a"], **other(max_neighbours=3)),
        "no kind": case("no", train_type="static", component_name=None),
        "less": case("no", component_name="less"),
        "too many": case("no", embed_neighbours=65),
        "losses": case("no", score_token_losses=True),
        "none near": case("no", dataset="nowhere", component_params={"select": {"max_neighbours": 0}}),
    }


Made = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def made(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("embed")
    make_model(folder / "other", intermediate_size=96)
    shutil.copytree(workspace / "model", folder / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    for name in ("model", "data"):
        shutil.copytree(workspace / name, folder / name, ignore=shutil.ignore_patterns(".*"))
    (folder / "near").mkdir()
    np.save(folder / "near/tsds_probs.npy", np.full(64, 1 / 64))  # of an earlier start, with tsds
    said = run_ranks("tests.driver.score_ranks:in_turn", 2, folder=str(folder), cases=_cases(folder))
    return folder, said[0]


@cache
def by_hand(folder: Path, model: str, weighted: bool = False, **changes: Any) -> tuple[Wide, Wide]:
    """Unit vectors of pool and target, float64 [n, H], one sample at a time."""
    cfg = load_config(keys(folder, "none", **changes), quiet=True)
    data: Any = load_data(cfg, load_tokenizer(cfg))
    module = AutoModel.from_pretrained(folder / model, dtype=torch.float64).eval()

    def vector(tokens: Any) -> Wide:
        with torch.no_grad():
            states = module(torch.tensor([list(tokens)])).last_hidden_state[0].numpy()
        weights = np.arange(1, len(states) + 1) if weighted else np.ones(len(states))
        mean = weights @ states
        return np.asarray(mean / np.linalg.norm(mean))

    pool, target = (
        np.stack([vector(part[i]["input_ids"]) for i in range(len(part))]) for part in (data.train, data.eval)
    )
    return pool, target


def nearest(pool: Wide, target: Wide) -> Wide:
    return np.argsort(-(target @ pool.T), axis=1, kind="stable")


def test_the_neighbours_are_those_of_embeddings_made_by_hand(made: Made) -> None:
    folder, said = made
    pool, target = by_hand(folder, "model")
    found = np.load(folder / "near/top_indices.npy")
    assert found.dtype == np.int64 and (found == nearest(pool, target)).all()
    facts = scores.read(folder / "near").facts
    store = StoreReader(Path(facts.features or ""))
    assert (store.arrays, len(store)) == (["embeddings"], 3)
    np.testing.assert_allclose(store.rows("embeddings", np.arange(64)), pool, atol=1e-6)
    kept = np.load(folder / "near/target_embeddings.npy")
    assert kept.dtype == np.float32
    np.testing.assert_allclose(kept, target, atol=1e-6)
    np.testing.assert_allclose(scores.read(folder / "near").score, (pool @ target.T).max(axis=1), atol=1e-6)
    assert (facts.component, facts.domains, facts.tasks) == ("near", ["a", "b"], ["target"])
    assert not (folder / "near/tsds_probs.npy").exists() and not (folder / "near/embeddings.npy").exists()
    assert f"of 8 samples of the target their 64 nearest: {folder}/near/top_indices.npy" in said["near"]


def test_another_models_neighbours_are_as_many_as_the_component_asks_for(made: Made) -> None:
    folder, _ = made
    expected = nearest(*by_hand(folder, "other"))
    assert (expected != nearest(*by_hand(folder, "model"))).any()
    assert (np.load(folder / "limited/top_indices.npy") == expected[:, :9]).all()
    assert not list((folder / "bare").glob("*.safetensors")), "so the model in training cannot have been loaded"
    unused = f"resume_from_checkpoint: not used, since {folder}/other (embedding_model) looks at the samples"
    assert unused in made[1]["limited"]


def test_probabilities_are_those_of_the_selector(made: Made) -> None:
    folder, _ = made
    pool, target = (rows.astype(np.float32) for rows in by_hand(folder, "other"))
    found = np.load(folder / "tsds/tsds_probs.npy")
    how = {"max_k": 6, "c": 5.0, **TSDS}
    right = pool_probabilities(Vectors.of(pool), target, torch.device("cpu"), **how)
    assert found.dtype == np.float64 and found.sum() == pytest.approx(1, abs=1e-12)
    assert 8 < np.count_nonzero(right) < 48
    np.testing.assert_allclose(found, right, atol=1e-5)
    assert np.load(folder / "tsds/top_indices.npy").shape == (8, 6)  # a tenth of the pool
    read = scores.read(folder / "tsds")
    assert (read.facts.aggregate, read.facts.replacement) == ("draw", True)
    assert read.score.tolist() == found.astype(np.float32).tolist()


def test_what_it_took_is_kept_and_shards_are_taken_up(made: Made) -> None:
    folder, said = made
    cost = json.loads((folder / "near/scores.json").read_text())["cost"]
    assert (cost["samples_scored"], cost["samples_taken_up"], cost["processes"]) == (64 + 8 + 8, 0, 2)
    assert cost["samples_scored_per_second"] > 0 and 50 < cost["peak_memory_mib"] < 50_000
    assert said["near"][-1].startswith("cost of the selection: ") and "72 samples, " in said["near"][-1]
    assert any("in 3 shards, 3 of them taken up" in line for line in said["again"])
    assert "72 samples, " in said["near"][-1] and "samples taken up" not in said["again"][-1]
    text = "\n".join(said["dry"])
    assert "dry run: the pool has 64 samples" in text and " of embeddings (fp32) a pass" in text
    assert not (folder / "dry").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no kind", "embed: needs train_type: dynamic_select with a component_name; valid: near, rds, tsds"),
        ("less", "component_name: selector 'less' goes by no embeddings; valid: near, rds, tsds"),
        ("too many", "embed_neighbours: 65 samples near each of the target's are asked for, the pool has 64"),
        ("losses", "score_token_losses: is of `dataflex-cli score`; embed makes no losses, drop it"),
        ("none near", "near: max_neighbours: expected a whole number >= 1, or null, got 0"),
    ],
)
def test_what_cannot_be_embedded_is_one_line_before_a_model_is_loaded(made: Made, name: str, text: str) -> None:
    assert made[1][name] == text


def choose(folder: Path, name: str, **changes: Any) -> tuple[list[str], pd.DataFrame]:
    """Run `select`; what it said, and its table."""
    path = folder / f"select_{name}.yaml"
    path.write_text(yaml.safe_dump(keys(folder, "none", select_dir=str(folder / f"chosen_{name}"), **changes)))
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        select(load_config(path, command="select", quiet=True))
    finally:
        logger.removeHandler(handler)
    return lines, pd.read_parquet(folder / f"chosen_{name}/scores.parquet")


def test_select_takes_by_the_files(made: Made) -> None:
    folder, _ = made
    lists = nearest(*by_hand(folder, "model"))
    dealt = list(dict.fromkeys(lists.T.ravel().tolist()))
    lines, table = choose(folder, "near", select_from=f"{folder}/near/top_indices.npy", select_count=20)
    assert table.query("picked")["sample_id"].tolist() == sorted(dealt[:20])
    cost = json.loads((folder / "chosen_near/dataflex_selection.json").read_text())["cost"]
    assert cost["samples_scored"] == 80 and "80 samples, " in lines[-1]
    _, table = choose(folder, "tsds", select_from=f"{folder}/tsds/tsds_probs.npy", select_count=50)
    probabilities = np.load(folder / "tsds/tsds_probs.npy")
    assert table["picked"].sum() == 50 and table["picked"][probabilities == 0].sum() == 0


def test_ids_mean_the_pool_without_what_val_size_held_out(made: Made) -> None:
    folder, _ = made
    found = np.load(folder / "held/top_indices.npy")
    pool, target = by_hand(folder, "other", val_size=8, eval_dataset=None)
    assert found.shape == (8, 56) and (found == nearest(pool, target)).all()
    held = {"val_size": 8, "eval_dataset": None}
    _, table = choose(folder, "held", select_from=f"{folder}/held/top_indices.npy", select_fraction=1.0, **held)
    out = pd.read_parquet(folder / "held/held_out.parquet")
    places = [set(zip(part["dataset"], part["row"], strict=True)) for part in (table, out)]
    assert [len(part) for part in places] == [56, 8] and not places[0] & places[1]
    info = json.loads((folder / "chosen_held/dataset_info.json").read_text())
    assert list(info) == ["a", "b", "a_held_out", "b_held_out"]


def test_the_folder_is_chosen_by_as_that_of_score(made: Made) -> None:
    folder, _ = made
    both = {"component_name": "rds", "eval_dataset": "target,b"}
    pool, target = by_hand(folder, "other", weighted=True, **both)
    free, picks, cosines = set(range(64)), list[int](), pool @ target.T
    for column in np.resize(in_turns(np.array([0] * 8 + [1] * 24)), 20).tolist():
        picks.append(max(free, key=lambda i: (cosines[i, column], -i)))
        free.remove(picks[-1])
    lines, table = choose(folder, "rds", select_from=str(folder / "rds"), select_count=20, **both)
    assert "picks that serve each subtask: target 10, b 10" in lines and not [line for line in lines if "few" in line]
    assert table.query("picked")["sample_id"].tolist() == sorted(picks)
    embedded, scored = (pd.read_parquet(folder / name / "scores.parquet") for name in ("rds", "scored"))
    pd.testing.assert_frame_equal(embedded, scored)
    facts = [scores.read(folder / name).facts for name in ("rds", "scored")]
    different = {"features", "cost", "beside"}
    assert facts[0].model_dump(exclude=different) == facts[1].model_dump(exclude=different)


def test_what_lies_beside_scores_is_of_their_samples(made: Made, tmp_path: Path) -> None:
    folder, said = made
    assert set(scores.read(folder / "near").facts.beside) == {"top_indices.npy", "target_embeddings.npy"}  # after score
    assert (folder / "moved/target_embeddings.npy").exists() is (folder / "moved/top_indices.npy").exists() is False
    assert any("near: max_neighbours: 3 is no part of scores" in line for line in said["score moved"])
    shutil.copytree(folder / "near", tmp_path / "near")
    shutil.copy(folder / "rds/top_indices.npy", tmp_path / "near")
    with pytest.raises(UserError, match=r"^select_from: .*near: top_indices.npy differs from what was written; embed "):
        choose(folder, "mixed", select_from=f"{tmp_path}/near/top_indices.npy", select_count=2)


@pytest.mark.parametrize("at", ["write_files", "write_target", "write_top_indices", "name_beside"])
def test_a_kill_leaves_no_file_of_other_scores(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    folder = shutil.copytree(made[0] / "limited", tmp_path / "run")
    pool, target = (rows.astype(np.float32) for rows in by_hand(made[0], "model"))
    found = Embedded(Vectors.of(pool), target)
    selector = SimpleNamespace(embeddings=SimpleNamespace(embed=lambda: found), draws=False, neighbours=2)
    selector.table_of = lambda found: VectorTable(*found, torch.device("cpu"))
    engine = SimpleNamespace(run=SimpleNamespace(clock=Clock()), scorer=SimpleNamespace(device=torch.device("cpu")))
    cfg = SimpleNamespace(score=SimpleNamespace(embed_neighbours=None))
    passing: Any = SimpleNamespace(
        selector=selector, engine=engine, folder=folder, pool=pool, inputs=SimpleNamespace(cfg=cfg)
    )
    monkeypatch.setattr(embedding, "write_files", lambda *_, **__: scores.read(folder).facts)
    monkeypatch.setattr({"write_files": embedding, "name_beside": scores}.get(at, embedding.files), at, killed)
    with pytest.raises(KeyboardInterrupt):
        embedding._write(passing)
    assert scores.read(folder).facts.beside == {}
    left = folder / "top_indices.npy"
    assert np.load(left).shape == (8, 2) if at == "name_beside" else not left.exists()


def test_of_too_many_scores_each_samples_largest_is_written() -> None:
    table, columns = ArrayTable(np.array([[1, 2, 3], [6, 5, 4]], dtype=np.float32)), {"subtasks": ["a", "b", "c"]}
    found, said = embedding._scores(table, columns, 6)
    assert found.tolist() == [[1, 2, 3], [6, 5, 4]] and said == columns
    found, said = embedding._scores(table, columns, 5)
    assert found.tolist() == [[3], [6]] and said == {}


def test_a_user_with_the_files_alone_needs_neither_model_nor_target(made: Made, tmp_path: Path) -> None:
    folder, _ = made
    np.save(tmp_path / "top_indices.npy", [[60, 2], [60, 1]])
    wanted = {"select_from": f"{tmp_path}/top_indices.npy", "select_count": 3, "dataset": "a,b"}
    own = {"dataset_dir": str(folder / "data"), "output_dir": str(tmp_path / "out"), **wanted}
    select(load_config(own, command="select", quiet=True))
    texts = [(tmp_path / f"out/selected/{name}.jsonl").read_text() for name in "ab"]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    assert [(row["dataflex_id"], row["size"]) for row in rows] == [(2, 2), (1, 1), (60, 4)]  # best first in each
    near = {"train_type": "dynamic_select", "component_name": "near"}
    select(load_config({**own, **near, "model_name_or_path": "/not/here"}, command="select", quiet=True))


def test_near_duplicates_by_embeddings_are_passed_over(made: Made) -> None:
    folder, _ = made
    pool, target = by_hand(folder, "model")
    order = np.argsort(-(pool @ target.T).max(axis=1), kind="stable").tolist()
    alike = float(np.sort((pool @ pool.T)[np.triu_indices(64, 1)])[-300:-298].mean())  # between two pairs
    kept: list[int] = []
    for sample in order:
        if len(kept) < 12 and all(pool[sample] @ pool[other] < alike for other in kept):
            kept.append(sample)
    assert kept != order[:12]
    how = {"select_from": str(folder / "near"), "select_count": 12, "select_aggregate": "max"}
    _, table = choose(folder, "alike", select_duplicates=alike, **how)
    assert table.query("picked")["sample_id"].tolist() == sorted(kept)
