"""Rows whose fact is on the engine: weights, draws, selection and mixing."""

from __future__ import annotations

from pathlib import Path

from tests.asked.engine_facts import first_values, own_part, parameters, phases, plan, planner, ratio, static, trained
from tests.asked.table import Build, Row
from tests.asked.training_rows import DOWN, FULL, saved

WEIGHTED = Build(
    "weighted",
    (
        Row(
            "sample_weight",
            "1 + size",
            lambda b: b.engine.run.pool.sample_weights[[0, 1, 2, 40, 41]].tolist(),
            [1, 2, 3, 1, 2],
        ),
        Row("sample_weight_as", "both", lambda b: [ratio(b, 2, 0), static(b).loss[41]], [3.0, 2.0]),
        Row("domain_weights", {"a": 2.5}, lambda b: static(b).loss[[0, 1, 40, 41]].tolist(), [2.5, 5, 1, 2]),
        Row("class_weights", {"7": 0.5}, lambda b: b.engine._loop.stepper.class_weight[6:9].tolist(), [1, 0.5, 1]),
        Row("sampling", "temperature", lambda b: type(planner(b)).__name__, "WeightedPlanner"),
        Row("sampling_temperature", 0.25, lambda b: ratio(b, 40, 0), (40 / 24) ** 0.75),
        Row("sampling_samples", 32, lambda b: phases(b), [(8, False)] * 3),
        Row(
            "sampling_replacement", False, lambda b: [planner(b).replacement, len(set(plan(b).flatten()))], [False, 32]
        ),
        Row("sampling_correction", False, lambda b: static(b).corrected, False),
        Row(
            "weight_normalization",
            "tokens",
            lambda b: [b.engine._loop.stepper.normalization, b.engine.loss_is_per],
            ["tokens", "token"],
        ),
    ),
    {**FULL, "max_steps": None},
)


SELECT = Build(
    "select",
    (
        Row("train_type", ["dynamic_select"], lambda b: type(planner(b)).__name__, "SelectPlanner"),
        Row(
            "component_name",
            "mine",
            lambda b: [type(planner(b).selector).__name__, planner(b).selector.spec.projection],
            ["LessSelector", "sjlt"],
        ),
        Row("components_cfg_file", "own.yaml", lambda b: planner(b).selector.spec.proj_dim, 96),
        Row(
            "component_params",
            {"select": {"seed": 9}},
            lambda b: [planner(b).selector.seed, planner(b).selector.spec.seed],
            [9, 9],
        ),
        Row("component_modules", ["own_part.py"], own_part, True),
        Row("warmup_step", 1, lambda b: phases(b)[0], (1, False)),
        Row("update_step", 2, lambda b: phases(b)[1], (2, True)),
        Row("update_times", 3, lambda b: b.engine.run.schedule.decisions, 3),
        Row("train_step", 10, lambda b: [b.engine.run.total_steps, phases(b)[-2:]], [10, [(2, False), (1, False)]]),
        Row("score_shard_samples", 7, lambda b: planner(b).selector.passes.shard_samples, 7),
        Row("keep_features", True, lambda b: planner(b).selector.passes.keep_features, True),
        Row("features_dir", "kept", lambda b: Path(planner(b).selector.passes.features_dir).name, "kept"),
    ),
    {**FULL, "max_steps": None, "eval_dataset": ["target"]},
)
MIXED = {**FULL, "train_type": "dynamic_mix"}
MIX = Build(
    "mix",
    (
        Row("static_mix", True, lambda b: [planner(b).mixer, planner(b).name], [None, "static"]),
        Row(
            "init_mixture_proportions",
            [3, 1],
            lambda b: [(plan(b) < 40).sum(1).mean(), planner(b).manager.proportions.tolist()],
            [3.0, [0.75, 0.25]],
        ),
        Row("warn_domain_epochs", 2.5, lambda b: planner(b).most_epochs, 2.5),
    ),
    MIXED,
)
STRATIFIED = Build(
    "stratified",
    (Row("mixture_sample_rule", "stratified", lambda b: planner(b).manager.proportions.tolist(), [0.625, 0.375]),),
    MIXED,
)
MOE = Build(
    "moe",
    (
        Row(
            "mixer_eval_dataset",
            ["target", "b"],
            lambda b: [planner(b).mixer.pool.domain_names, len(planner(b).mixer.pool)],
            [["target", "b"], 32],
        ),
        Row(
            "freeze_gate",
            True,
            lambda b: [sum("gate.weight" in n for n in of(b)) for of in (parameters, trained)],
            [2, 0],
        ),
    ),
    {**MIXED, "model_name_or_path": "moe", "component_name": "dynamic_moe", "update_step": 2},
)
DOREMI = Build(
    "doremi",
    (
        Row(
            "reference_model_path",
            "other",
            lambda b: first_values(b, DOWN, planner(b).mixer._reference.model),
            saved("other", DOWN),
        ),
    ),
    {**MIXED, "component_name": "doremi", "update_step": 2},
)
