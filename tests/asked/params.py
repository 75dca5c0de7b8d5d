"""Every param of every component: a value that is not the default, and what the built component does with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import dataflex
from dataflex.core.plan import generator
from dataflex.utils import dist
from tests import tiny_engine as tiny
from tests.asked.param_facts import (
    POOL,
    SIZES,
    STEP,
    adapted,
    after_learning,
    anchors,
    clustered,
    doubted,
    drawn,
    factors,
    kept_tokens,
    next_number,
    refreshed,
    rewarded,
    routed,
    softmax,
    some_of_each,
    towards_equal,
    voted,
    weighed,
)
from tests.tiny import byte_tokenizer, tiny_llama


@dataclass(frozen=True)
class Asked:
    """The param ``name``: ``value`` makes ``fact`` of the built component equal to ``right``."""

    name: str
    value: Any
    fact: Callable[[Any], Any]
    right: Any


@dataclass(frozen=True)
class Component:
    """A component that is built once with the params of its rows. variant: tells two of one name apart."""

    kind: str
    name: str
    rows: tuple[Asked, ...]
    variant: str = ""
    model: str = "full"

    @property
    def id(self) -> str:
        return "-".join(filter(None, (self.kind, self.name, self.variant)))


def facts(folder: str) -> dict[str, Any]:
    """{component: facts of its rows}; runs on one rank."""
    if dist.is_main():
        tiny_llama(initializer_range=0.02, seed=1).save_pretrained(Path(folder) / "reference")
    return {one.id: _of(one, Path(folder)) for one in COMPONENTS}


def _of(one: Component, folder: Path) -> list[Any]:
    """The facts of a component's rows; a fact that several share is looked up once, since it may move the component."""
    component = _built(one, folder)
    known = {}
    for row in one.rows:
        if row.fact not in known:
            known[row.fact] = row.fact(component)
    return [known[row.fact] for row in one.rows]


def _built(one: Component, folder: Path) -> Any:
    """The component in a new engine, as `dataflex.initialize` makes it from a components file."""
    path = folder / f"{one.id}.yaml"
    path.write_text(yaml.safe_dump({f"{one.kind}s": {one.name: {"params": {r.name: r.value for r in one.rows}}}}))
    decides = {"selector": "dynamic_select", "mixer": "dynamic_mix", "weighter": "dynamic_weight"}
    targets = {name: _with_tasks(tiny.samples(3, seed=seed)) for name, seed in (("near", 1), ("far", 2))}
    engine = dataflex.initialize(
        model=tiny.model(one.model),
        config=tiny.ds_config(0),
        dataflex={
            "train_type": decides[one.kind],
            "component_name": one.name,
            "components_cfg_file": str(path),
            "reference_model_path": str(folder / "reference"),
            "output_dir": str(folder / one.id),
            "train_step": 20,
            **({} if one.kind == "weighter" else {"update_step": 2}),
        },
        train_dataset={name: tiny.samples(size, seed=size) for name, size in SIZES.items()},
        eval_dataset=targets,
        tokenizer=byte_tokenizer(),
    )
    attribute = {"selector": "selector", "mixer": "mixer", "weighter": "weighter"}[one.kind]
    return next(getattr(hook, attribute) for hook in engine._loop.hooks if hasattr(hook, attribute))


def _with_tasks(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**sample, "task": "xxy"[i]} for i, sample in enumerate(samples)]


# Each of the six samples of the target votes for 4 of 80 (for 3, a share by the picks would have it).
VOTED = [6, [10, 0, 1], [6.0, 6.0, 6.0], ["x", "x", "x"], [0, 4, 4]]
VOTE = tuple(
    Asked(name, value, voted, VOTED) for name, value in (("aggregate", "vote"), ("per", "target"), ("vote_share", 0.05))
)
LESS = (
    Asked("adam_form", "optimizer", lambda s: s.spec.adam, "adam"),
    Asked("projection", "countsketch", lambda s: s.spec.projection, "countsketch"),
    Asked("proj_dim", 96, lambda s: s.spec.projected()["proj_dim"], 96),
    Asked("layers", ["layers.1"], factors, [0.0, 0.0, 2.0, 1.0]),
    Asked("layer_weights", {"mlp": 2.0}, factors, [0.0, 0.0, 2.0, 1.0]),
    Asked("subtask_column", "task", lambda s: s.subtasks.ids.tolist(), [0, 0, 1, 0, 0, 1]),
    *VOTE,
    Asked("accumulate", True, lambda s: s.accumulate, True),
    Asked("self_check", False, lambda s: s.unchecked, False),
    Asked("seed", 3, lambda s: s.spec.projected()["seed"], 3),
)
LESS_EXACT = (
    Asked("gradient_type", "sgd", lambda s: [s.spec.adam, s.use_plain_gradient()], [None, False]),
    Asked("scoring", "exact", lambda s: s.spec.proj_dim, 0),
)
LESS_HEAD = (
    Asked("sketch_dim", 64, lambda s: s.features.sketch_dim, 64),
    Asked("proj_dim", 128, lambda s: s.features.of_samples(s.scorer, s.target).shape[1], 128),
    Asked("seed", 3, lambda s: s.features.seed, 3),
    Asked("subtask_column", "task", lambda s: s.subtasks.ids.tolist(), [0, 0, 1, 0, 0, 1]),
    *VOTE,
)
# Of 6 clusters, 2 representatives of each.
CLUSTERS = ["last", 6, 12, 3]
CLUSTER_LESS = (
    Asked("n_clusters", 6, clustered, CLUSTERS),
    Asked("representatives", 2, clustered, CLUSTERS),
    Asked("pooling", "last", clustered, CLUSTERS),
    Asked("seed", 3, clustered, CLUSTERS),
    Asked("adam_form", "optimizer", lambda s: s.spec.adam, "adam"),
    Asked("proj_dim", 64, lambda s: s.spec.projected()["proj_dim"], 64),
    Asked("subtask_column", "task", lambda s: s.subtasks.ids.tolist(), [0, 0, 1, 0, 0, 1]),
)
CLUSTER_LESS_SGD = (Asked("gradient_type", "sgd", lambda s: s.spec.adam, None),)
EMBEDDED = (
    Asked("layer", 1, lambda s: s.embeddings.layer, 1),
    Asked("embedding_model", "configs/models/tiny_llama", lambda s: s.embeddings.embedder.width, 96),
    Asked("refresh", "once", lambda s: s.embeddings.refresh, "once"),
)
DEALT = (
    Asked("aggregate", "vote", lambda s: s.aggregate, "vote"),
    Asked("per", "subtask", lambda s: s.width, 2),
    Asked("subtask_column", "task", lambda s: s.subtasks.ids.tolist(), [0, 0, 1, 0, 0, 1]),
    Asked("vote_share", 0.25, lambda s: s.vote_share, 0.25),
)
RDS = (*DEALT, *EMBEDDED, Asked("pooling", "last", lambda s: s.embeddings.pooling, "last"))
NEAR = (*RDS, Asked("max_neighbours", 5, lambda s: s.max_neighbours, 5))
# A tenth of 80 samples are the most neighbours.
TSDS = (
    *EMBEDDED,
    Asked("pooling", "weighted", lambda s: s.embeddings.pooling, "weighted"),
    Asked("max_k", 7, lambda s: s.max_k, 7),
    Asked("kde_k", 900, lambda s: s.kde_k, 8),
    Asked("sigma", 0.5, lambda s: s.sigma, 0.5),
    Asked("alpha", 0.25, lambda s: s.alpha, 0.25),
    Asked("c", 2.0, lambda s: s.c, 2.0),
    Asked("replacement", False, lambda s: s.replacement, False),
    Asked("seed", 3, lambda s: s.seed, 3),
)
# Losses 0 to 79: the quantiles are at 15.8 and 39.5, and the middle weighs 9 to the power 1/2.
DRAWN = [[1.0, 1.0, 3.0, 3.0, 1.0], True, next_number(3, "loss_selector", STEP)]
LOSS = tuple(
    Asked(name, value, drawn, DRAWN)
    for name, value in {
        "focus": "medium",
        "focus_weight": 9.0,
        "quantiles": [0.2, 0.5],
        "temperature": 2.0,
        "replacement": True,
        "seed": 3,
    }.items()
)
REPEATED = generator(3, "random_selector", STEP).choice(POOL, 90, replace=True).tolist()
RANDOM = tuple(
    Asked(name, value, lambda s: s.select(None, STEP, 90), REPEATED)
    for name, value in {"seed": 3, "replacement": True}.items()
)
SHARES = generator(3, "random_mixer", STEP).random(3)
DOREMI = (
    Asked("reweight_eta", 0.5, after_learning, towards_equal(softmax(0.5, 1.5, 0), 0.1)),
    Asked("reweight_eps", 0.1, after_learning, towards_equal(softmax(0.5, 1.5, 0), 0.1)),
)
DOREMI_OFFICIAL = (
    Asked("variant", "official", lambda m: [m.weighted_mean, list(m.excess)], [True, [float(np.log(259))] * 3]),
)
ROUTED = towards_equal(softmax(2 * 2**0.5 / 3, 2 * 2**0.5 / 3, 2 * 2 * 2**0.5 / 3), 0.2)
MOE = (
    Asked("variant", "official", lambda m: list(m.weights), [1 / 3] * 3),
    Asked("eta", 2.0, routed, ROUTED),
    Asked("c", 0.2, routed, ROUTED),
    Asked("eval_samples", 5, lambda m: m.ids.tolist(), some_of_each(3, 5)),
    Asked("seed", 3, lambda m: m.ids.tolist(), some_of_each(3, 5)),
)
ODM = (Asked("alpha", 0.75, rewarded, [0.25 * 1 * 3, 0.25 * 3 * 3, 0.0]),)
ODM_OFFICIAL = (Asked("variant", "official", rewarded, [0.1 * np.e, 0.1 * np.e**3, 0.0]),)
POWERS = np.array([24.0, 40.0, 16.0]) ** 0.3
# In the middle of the run r is 2.5; h is -2, -2/3, 2, so f is 2, 2/3, 2.
EXTREMES = list(3 * softmax(2 / 2.5, 2 / 3 / 2.5, 2 / 2.5))
WEIGHTS = tuple(
    Asked(name, value, weighed, EXTREMES)
    for name, value in {"strategy": "extremes", "delta": 2.0, "r_start": 4.0, "r_end": 1.0}.items()
)
# The steps in which the anchors are embedded, and the directions that are kept of them.
ADAPT = (
    *(
        Asked(name, value, refreshed, ["last", anchors(3), [0, 3, 6], 2])
        for name, value in {
            "pooling": "last",
            "num_anchors": 2,
            "seed": 3,
            "refresh_step": 3,
            "similarity": "max",
        }.items()
    ),
    Asked("weight", "softmax", adapted, list(2 * softmax(2, 4))),
    Asked("temperature", 0.05, adapted, list(2 * softmax(2, 4))),
)
# Of four tokens that are equally likely the entropy of two is looked at.
EAFT = tuple(Asked(name, value, doubted, [(np.log(2) / 3) ** 2]) for name, value in {"alpha": 2.0, "top": 2}.items())
# Two of eight tokens, whose weights are 4 then; the last two of excess.
RHO = (Asked("share", 0.25, kept_tokens, [0, 0, 0, 0, 0, 0, 4.0, 4.0]),)
COMPONENTS = (
    Component("selector", "less", LESS),
    Component("selector", "less", LESS_EXACT, "exact"),
    Component("selector", "less_head", LESS_HEAD),
    Component("selector", "cluster_less", CLUSTER_LESS),
    Component("selector", "cluster_less", CLUSTER_LESS_SGD, "sgd"),
    Component("selector", "rds", RDS),
    Component("selector", "near", NEAR),
    Component("selector", "tsds", TSDS),
    Component("selector", "loss", LOSS),
    Component("selector", "random", RANDOM),
    Component("mixer", "random", (Asked("seed", 3, lambda m: list(m.mix(None, STEP)), list(SHARES / SHARES.sum())),)),
    Component(
        "mixer", "static", (Asked("proportions", [3, 1, 1], lambda m: list(m.mix(None, STEP)), [0.6, 0.2, 0.2]),)
    ),
    Component(
        "mixer", "temperature", (Asked("tau", 0.3, lambda m: list(m.mix(None, STEP)), list(POWERS / POWERS.sum())),)
    ),
    Component("mixer", "odm", ODM),
    Component("mixer", "odm", ODM_OFFICIAL, "official"),
    Component("mixer", "doremi", DOREMI),
    Component("mixer", "doremi", DOREMI_OFFICIAL, "official"),
    Component("mixer", "dynamic_moe", MOE, model="moe"),
    Component("weighter", "loss", WEIGHTS),
    Component("weighter", "adapt", ADAPT),
    Component("weighter", "eaft", EAFT),
    Component("weighter", "rho", RHO),
)
