"""What kept scores, features and token losses are made from: one ingredient at a time changes, and a new pass runs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.config import Config
from dataflex.config.components import component_params
from dataflex.config.schema import FlexSection, ModelSection, OutputSection
from dataflex.config.sections.score import ScoreSection
from dataflex.core.registry import REGISTRY
from dataflex.data.pool import Pool
from dataflex.engine.folder import identity
from dataflex.ops import Transform
from dataflex.scoring.kept import sharded, token_losses
from dataflex.scoring.kept.store import read_manifest
from dataflex.train.trainer.build import passes_of
from dataflex.train.trainer.components import RUNTIME, load_components
from dataflex.utils.stopping import Stop
from tests import tiny_engine as tiny
from tests.scoring.test_coverage import PlainEngine, random_moments, scorer

POOL, TARGET = 5, 4
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks transformers for it


@cache
def the_model() -> torch.nn.Module:
    net = tiny.model("lora")
    net.register_buffer("bias", torch.zeros(3))
    return net


def samples(count: int, seed: int) -> list[dict[str, list[int]]]:
    return tiny.samples(count, seed, shortest=4, longest=7)


@dataclass
class World:
    """All that a pass of LESS's depends on; a row of a table changes one of it."""

    params: dict[str, Any] = field(default_factory=lambda: {"proj_dim": 32, "self_check": False})
    name: str = "less"
    model: str = "some/model"
    adapter: str | None = None
    change: Callable[[torch.nn.Module], None] = lambda net: None
    pool: tuple[int, int] = (POOL, 1)
    target: Any = (TARGET, 2)
    moments: tuple[float, float] = (1.0, 1.0)
    constants: Transform = field(default_factory=lambda: Transform("adam_less", 0.9, 0.99, 1e-6, 3))
    shard: int = 4
    keep_features: bool = False
    version: str = "1"


def passed(folder: Path, world: World, ask: Callable[[Any], Any] = lambda selector: selector.table()) -> int:
    """How many samples of the pool a selection scores, if it finds what lies in ``folder``."""
    load_components()
    net = copy.deepcopy(the_model())
    world.change(net)
    data, pool = scorer(net), Pool.from_datasets(samples(*world.pool))
    moments = {n: (m * world.moments[0], v * world.moments[1]) for n, (m, v) in random_moments(net).items()}
    data._read_moments = lambda names: ({n: moments[n] for n in names}, world.constants)
    engine: Any = PlainEngine(net)
    engine.global_steps, engine.skipped_steps = 3, 0
    engine.optimizer = SimpleNamespace(param_groups=[{"betas": (0.9, 0.99)}])
    target = world.target if isinstance(world.target, Pool) else Pool.from_datasets(samples(*world.target))
    config = Config(
        model=ModelSection(model_name_or_path=world.model, adapter_name_or_path=world.adapter),
        flex=FlexSection(
            train_type=("dynamic_select",), component_name=world.name, component_params={"select": world.params}
        ),
        score=ScoreSection(score_shard_samples=world.shard, keep_features=world.keep_features),
        output=OutputSection(output_dir=str(folder)),
    )
    scored: list[int] = []
    run_backward = data.run_backward

    def counted(dataset: Any, ids: Any, *rest: Any, **more: Any) -> None:
        scored.append(len(ids) if dataset is pool else 0)
        run_backward(dataset, ids, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "read_moments", lambda engine, names: data._read_moments(names))
        patch.setattr(sharded, "__version__", world.version)
        patch.setattr(data, "run_backward", counted)
        run: Any = SimpleNamespace(output_dir=folder, step=3, stop=Stop())
        passes = passes_of(run, config, engine)
        runtime = dict.fromkeys(RUNTIME) | {"dataset": pool, "eval_dataset": target, "scorer": data, "passes": passes}
        name, params = component_params(config.flex, "select")
        ask(REGISTRY.build("selector", name, runtime=runtime, cfg=params))
    return sum(scored)


def parts_in(folder: Path) -> dict[str, dict[str, str]]:
    """The fingerprints of the stores in a run's folder, by the stores' names."""
    return {p.parent.name: dict(read_manifest(p.parent).fingerprint) for p in sorted(folder.glob("*/*/manifest.json"))}  # type: ignore[union-attr]


def with_params(**params: Any) -> dict[str, Any]:
    return {"params": {"proj_dim": 32, "self_check": False} | params}


def tensor(name: str) -> Callable[[torch.nn.Module], None]:
    """Add a little to the last value of the first parameter or buffer whose name holds ``name``."""

    def change(net: torch.nn.Module) -> None:
        found = next(t for n, t in (*net.named_parameters(), *net.named_buffers()) if name in n)
        with torch.no_grad():
            found.view(-1)[min(15, found.numel() - 1)] += 1e-3  # of what is frozen the first 16 are looked at

    return change


def alpha(net: Any) -> None:
    net.peft_config["default"].lora_alpha = 16


def epsilon(net: Any) -> None:
    net.config.rms_norm_eps = 1e-3


def two_subtasks(first: int = 2) -> Pool:
    """The usual target, whose samples are of two domains."""
    made = samples(TARGET, 2)
    pool = Pool.from_datasets({"a": made[:first], "b": made[first:]})
    pool.fingerprint = Pool.from_datasets(made).fingerprint
    return pool


# What changes: (of the `World`, the part of the fingerprint in which it is seen).
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "the model's name": ({"model": "other/model"}, "base weights"),
    "the adapter's name": ({"adapter": "some/adapter"}, "base weights"),
    "a frozen weight": ({"change": tensor("embed_tokens")}, "base weights"),
    "a buffer": ({"change": tensor("bias")}, "base weights"),
    "a trained weight": ({"change": tensor("lora_A")}, "trained weights"),
    "the last trained weight": ({"change": tensor("layers.1.mlp.down_proj.lora_B")}, "trained weights"),
    "LoRA's alpha": ({"change": alpha}, "model settings"),
    "a number of the model's config": ({"change": epsilon}, "model settings"),
    "Adam's first moments": ({"moments": (1.01, 1.0)}, "Adam's moments"),
    "Adam's second moments": ({"moments": (1.0, 1.01)}, "Adam's moments"),
    "Adam's betas": ({"constants": Transform("adam_less", 0.8, 0.99, 1e-6, 3)}, "Adam's moments"),
    "Adam's second beta": ({"constants": Transform("adam_less", 0.9, 0.98, 1e-6, 3)}, "Adam's moments"),
    "Adam's eps": ({"constants": Transform("adam_less", 0.9, 0.99, 1e-5, 3)}, "Adam's moments"),
    "the content of the pool": ({"pool": (POOL, 5)}, "pool"),
    "the size of the pool": ({"pool": (POOL + 1, 1)}, "samples"),
    "the content of the target": ({"target": (TARGET, 6)}, "target"),
    "the subtasks": ({"target": two_subtasks()}, "target"),
    "the number of subtasks": ({"target": two_subtasks(1)}, "columns"),
    "the component": ({"name": "less_exact", "params": {"self_check": False}}, "component"),
    "the version": ({"version": "2"}, "dataflex"),
    "the shards": ({"shard": 3}, "shard"),
}
# Of each param of LESS's that changes its scores a value that is not the default (and not that of `World`).
PARAMS: dict[str, Any] = {
    "gradient_type": "sgd",
    "adam_form": "optimizer",
    "scoring": "exact",
    "projection": "countsketch",
    "proj_dim": 64,
    "layers": ["last:1"],
    "layer_weights": {"q_proj": 2.0},
    "subtask_column": "input_ids",
    "per": "target",
    "seed": 5,
}
# Of each param that says what is taken by the scores.
DECISIONS: dict[str, dict[str, Any]] = {
    "aggregate": {"aggregate": "round_robin"},
    "vote_share": {"aggregate": "vote", "vote_share": 0.4},
    "accumulate": {"accumulate": True},
    "self_check": {"self_check": True},
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with the scores of the usual world, and their fingerprint."""
    folder = tmp_path_factory.mktemp("scores")
    assert passed(folder, World()) == POOL
    return folder, next(iter(parts_in(folder).values()))


@pytest.mark.parametrize("case", CHANGES)
def test_one_change_makes_a_new_pass_and_none_makes_none(kept: tuple[Path, dict[str, str]], case: str) -> None:
    (folder, usual), (changes, part) = kept, CHANGES[case]
    before, world = parts_in(folder), replace(World(), **changes)
    assert passed(folder, world) == world.pool[0]
    (parts,) = (parts for name, parts in parts_in(folder).items() if name not in before)
    assert part in {name for name in parts.keys() | usual.keys() if parts.get(name) != usual.get(name)}
    assert passed(folder, World()) == passed(folder, world) == 0


def test_every_part_of_the_fingerprint_has_a_row(kept: tuple[Path, dict[str, str]]) -> None:
    assert {part for _, part in CHANGES.values()} == set(kept[1]), "add a row to CHANGES"


@pytest.mark.parametrize("param", PARAMS)
def test_a_param_of_the_scores_makes_a_new_pass(kept: tuple[Path, dict[str, str]], param: str) -> None:
    world = replace(World(), **with_params(**{param: PARAMS[param]}))
    assert passed(kept[0], world) == POOL
    assert passed(kept[0], world) == 0


@pytest.mark.parametrize("param", DECISIONS)
def test_a_param_of_the_decision_makes_none(kept: tuple[Path, dict[str, str]], param: str) -> None:
    before = parts_in(kept[0])
    assert passed(kept[0], replace(World(), **with_params(**DECISIONS[param]))) == 0
    assert parts_in(kept[0]) == before


def test_another_rule_or_number_of_picks_takes_others_by_the_same_scores(tmp_path: Path) -> None:
    """By the scores that lie on the disk, for which nothing is scored again; best first, and whose turn it is."""
    two = two_subtasks()
    usual = World(target=two)
    assert passed(tmp_path, usual) == POOL
    (store,) = tmp_path.glob("scores/*")
    table = np.concatenate([np.load(path) for path in sorted(store.glob("*.npy"))])
    assert table.shape == (POOL, 2)
    best = np.argsort(-table, axis=0, kind="stable")
    second = next(i for i in best[:, 1].tolist() if i != best[0, 0])
    for count in (1, 2):
        for rule, right in (
            ("max", np.argsort(-table.max(axis=1), kind="stable")),
            ("mean", np.argsort(-table.mean(axis=1, dtype=np.float64), kind="stable")),
            ("round_robin", [int(best[0, 0]), second]),
        ):
            world, asked = replace(usual, **with_params(aggregate=rule)), list[Any]()
            assert passed(tmp_path, world, lambda s, n=count, to=asked: to.append(s.select(None, 3, n))) == 0
            assert asked[0] == list(right)[:count], rule


def test_a_default_that_is_spelled_out_is_the_same_scores(kept: tuple[Path, dict[str, str]]) -> None:
    assert passed(kept[0], replace(World(), **with_params(adam_form="official", layers=None))) == 0


def test_every_param_of_less_has_a_row() -> None:
    load_components()
    cls = REGISTRY.get("selector", "less")
    params = set(inspect.signature(cls).parameters) - set(RUNTIME)
    assert params == {*PARAMS, *DECISIONS}, "add a row to PARAMS"
    assert cls.decides_by - {"per", "subtask_column"} == set(DECISIONS)  # type: ignore[attr-defined]


def test_kept_features_serve_other_targets_and_nothing_else(tmp_path: Path) -> None:
    """Features do not depend on the target, so that another one needs no pass; on all else they do."""
    usual = World(keep_features=True)
    assert passed(tmp_path, usual) == POOL
    one_each = {part: changes for changes, part in CHANGES.values()}
    for part, changes in one_each.items():
        if part != "component":  # exact scores have no features
            world = replace(usual, **changes)
            assert passed(tmp_path, world) == (0 if part in ("target", "columns") else world.pool[0]), part
    for params in ({"per": "target"}, {"subtask_column": "input_ids"}, *DECISIONS.values()):
        assert passed(tmp_path, replace(usual, **with_params(**params))) == 0, params
    assert passed(tmp_path, usual) == 0
    (stored,) = {tuple(sorted(parts)) for parts in parts_in(tmp_path).values()}
    assert set(stored) == {part for _, part in CHANGES.values()} - {"target", "columns"}


def test_token_losses_of_another_fingerprint_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny.model("full")
    data = scorer(net)
    counted: list[int] = []
    stream = data.stream_losses
    monkeypatch.setattr(data, "stream_losses", lambda pool, ids, *a: (counted.append(len(ids)), stream(pool, ids, *a)))
    world: dict[str, Any] = {"seed": 1, "parts": {"base weights": "a"}, "shard": 2, "version": "1"}

    def made(**changes: Any) -> int:
        """Samples whose losses were computed; a folder holds one store."""
        now = world | changes
        counted.clear()
        monkeypatch.setattr(token_losses, "__version__", now["version"])
        pool = Pool.from_datasets(samples(POOL, now["seed"]))
        token_losses.write_token_losses(data, pool, tmp_path, now["parts"], now["shard"])
        return sum(counted)

    rows = {"pool": {"seed": 2}, "base weights": {"parts": {"base weights": "b"}}, "shard": {"shard": 3}}
    rows["dataflex"] = {"version": "2"}
    for changes in rows.values():
        assert made() == POOL and made() == 0
        assert made(**changes) == POOL and made(**changes) == 0
    manifest = read_manifest(tmp_path)
    assert manifest is not None and set(manifest.fingerprint) == set(rows), "add a row"


def test_the_code_of_an_own_component_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text("class Mine:\n    pass\n")
    mine = type("Mine", (), {"__module__": "mine"})
    monkeypatch.setitem(REGISTRY._classes["selector"], "mine", mine)
    monkeypatch.setattr(inspect, "getsourcefile", lambda cls: str(file))
    first = REGISTRY.code_of("selector", "mine")
    assert first == REGISTRY.code_of("selector", "mine") != ""
    file.write_text("class Mine:\n    better = True\n")
    assert REGISTRY.code_of("selector", "mine") != first
    load_components()
    assert REGISTRY.code_of("selector", "less") == ""


def test_a_digest_takes_buffers_of_every_kind() -> None:
    values = [torch.tensor([True, False]), torch.tensor([1 + 2j]), torch.tensor(3), torch.empty(0)]
    assert len({identity.bits_digest(v) for v in values}) == len(values)
    assert identity.bits_digest(values[1]) != identity.bits_digest(values[1].conj().resolve_conj())
    assert np.unique([identity.bits_digest(torch.full((2,), x)) for x in (True, False)]).size == 2
