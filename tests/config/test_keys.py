# ruff: noqa: E501 - whole lines of text are easier to search for
"""Every key of LLaMA-Factory YAMLs that is honoured: accepted, typed, at its place; YAML traps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflex.config import Config, load_config
from dataflex.config.paths import packaged_folder
from dataflex.config.schema import SECTION_OF, SECTIONS
from dataflex.config.yaml_reader import parse_yaml

KEYS: list[tuple[str, str, Any]] = [
    ("model_name_or_path: org/m", "model", "org/m"),
    ("adapter_name_or_path: out/a", "model", "out/a"),
    ("trust_remote_code: true", "model", True),
    ("train_from_scratch: yes", "model", True),
    ("flash_attn: fa2", "model", "fa2"),
    ("model_revision: v2", "model", "v2"),
    ("cache_dir: hub", "model", "hub"),
    ("new_special_tokens: <a>,<b>", "model", ("<a>", "<b>")),
    ("resize_vocab: true", "model", True),
    ("stage: pt", "method", "pt"),
    ("do_train: true", "method", True),
    ("finetuning_type: freeze", "method", "freeze"),
    ("lora_rank: 16", "method", 16),
    ("lora_alpha: 8", "method", 8),
    ("lora_dropout: 0.1", "method", 0.1),
    ("use_rslora: true", "method", True),
    ("lora_target: q_proj,v_proj", "method", ("q_proj", "v_proj")),
    ("additional_target: embed_tokens", "method", ("embed_tokens",)),
    ("freeze_trainable_layers: -3", "method", -3),
    ("freeze_trainable_modules: mlp, self_attn", "method", ("mlp", "self_attn")),
    ("freeze_extra_modules: embed_tokens,norm", "method", ("embed_tokens", "norm")),
    ("gradient_checkpointing: off", "method", False),
    ("disable_gradient_checkpointing: true", "method", True),
    ("use_reentrant_gc: false", "method", False),
    ("dataset: [a, b]", "data", ("a", "b")),
    ("eval_dataset: c", "data", ("c",)),
    ("dataset_dir: ../data", "data", "../data"),
    ("template: llama3", "data", "llama3"),
    ("default_system: Be brief.", "data", "Be brief."),
    ("enable_thinking: false", "data", False),
    ("cutoff_len: 4096", "data", 4096),
    ("max_samples: 100000000", "data", 100000000),
    ("train_on_prompt: true", "data", True),
    ("mask_history: true", "data", True),
    ("val_size: 0.001", "data", 0.001),
    ("val_size: 200", "data", 200),
    ("subtask_column: task\neval_dataset: c", "data", "task"),
    ("packing: true", "data", True),
    ("neat_packing: true", "data", True),
    ("streaming: false", "data", False),
    ("buffer_size: 128", "data", 128),
    ("tokenized_path: saves/tok", "data", "saves/tok"),
    ("overwrite_cache: true", "data", True),
    ("preprocessing_num_workers: 16", "data", 16),
    ("dataloader_num_workers: 4", "data", 4),
    ("sample_weight: quality", "data", "quality"),
    ("sample_weight: 1 + quality / 2", "data", "1 + quality / 2"),
    ("sample_weight_as: both\nsample_weight: w", "weighting", "both"),
    ("domain_weights: {a: 2, b: 0.5}", "weighting", {"a": 2.0, "b": 0.5}),
    ("class_weights: {17: 2, ja: 0}", "weighting", {"17": 2.0, "ja": 0.0}),
    ("role_weights: {answer: 0.1}", "weighting", {"answer": 0.1}),
    ("turn_weights: [0, 1]", "weighting", (0.0, 1.0)),
    ("token_weight: per_token", "weighting", "per_token"),
    (
        "token_weight_spans: {<think>: [</think>, 0.5], A: [null, 2]}",
        "weighting",
        {"<think>": ("</think>", 0.5), "A": (None, 2.0)},
    ),
    ("sampling: inverse_domain", "weighting", "inverse_domain"),
    ("sampling_temperature: 0.3", "weighting", 0.3),
    ("sampling_replacement: true", "weighting", True),
    ("sampling_samples: 100", "weighting", 100),
    ("sampling_correction: true", "weighting", True),
    ("per_device_train_batch_size: 2", "train", 2),
    ("gradient_accumulation_steps: 8", "train", 8),
    ("per_device_eval_batch_size: 1", "train", 1),
    ("learning_rate: 1e-4", "train", 1e-4),
    ("learning_rate: 1.0e-4", "train", 1e-4),
    ("lr_scheduler_type: cosine", "train", "cosine"),
    ("warmup_ratio: 0.1", "train", 0.1),
    ("warmup_steps: 20", "train", 20),
    ("num_train_epochs: 0.5", "train", 0.5),
    ("max_steps: 2000", "train", 2000),
    ("bf16: true", "train", True),
    ("fp16: on", "train", True),
    ("seed: 7", "train", 7),
    ("data_seed: 8", "train", 8),
    ("optim: adamw_torch_fused", "train", "adamw_torch_fused"),
    ("optim: adamw_hf", "train", "adamw_torch"),
    ("adam_beta1: 0.8", "train", 0.8),
    ("adam_beta2: 0.95", "train", 0.95),
    ("adam_epsilon: 1e-6", "train", 1e-6),
    ("weight_decay: 0.1", "train", 0.1),
    ("max_grad_norm: 0.5", "train", 0.5),
    ("deepspeed: ds_zero3.json", "train", "ds_zero3.json"),
    ("ddp_timeout: 180000000", "train", 180000000),
    ("group_by_length: true", "train", True),
    ("layer_lr_multipliers: {layers.0: 0.5}", "train", {"layers.0": 0.5}),
    ("output_dir: saves/x", "output", "saves/x"),
    ("overwrite_output_dir: true", "output", True),
    ("resume_from_checkpoint: saves/x/checkpoint-5", "output", "saves/x/checkpoint-5"),
    ("resume_from_checkpoint: yes", "output", True),
    ("resume_from_checkpoint: Auto", "output", "auto"),
    ("logging_steps: 5", "output", 5),
    ("logging_steps: 0.05", "output", 0.05),
    ("save_steps: 100", "output", 100),
    ("save_steps: 0.5", "output", 0.5),
    ("save_total_limit: 2", "output", 2),
    ("save_strategy: no", "output", "no"),
    ("save_only_model: true", "output", True),
    ("plot_loss: true", "output", True),
    ("report_to: none", "output", ()),
    ("report_to: no", "output", ()),
    ("report_to: false", "output", ()),
    ("report_to: [wandb, tensorboard]", "output", ("wandb", "tensorboard")),
    ("report_to: [comet_ml, mlflow, trackio]", "output", ("comet", "mlflow", "trackio")),
    ("report_to: all", "output", ("all",)),
    ("tracker_options: {swanlab: {project: p}}", "output", {"swanlab": {"project": "p"}}),
    ("run_name: 2024-01-01", "output", "2024-01-01"),
    ("run_name: 010", "output", "010"),
    ("eval_strategy: no", "output", "no"),
    ("eval_strategy: false", "output", "no"),
    ("eval_steps: 50", "output", 50),
    ("eval_steps: 0.1", "output", 0.1),
    (
        "load_best_model_at_end: true\neval_strategy: epoch\neval_dataset: c\nsave_strategy: epoch",
        "output",
        True,
    ),
    ("metric_for_best_model: loss", "output", "loss"),
    ("greater_is_better: false", "output", False),
    ("loraplus_lr_ratio: 16", "train", 16.0),
    ("lr_scheduler_kwargs: {min_lr: 1e-6}\nlr_scheduler_type: cosine_with_min_lr", "train", {"min_lr": 1e-6}),
    ("neftune_noise_alpha: 5", "train", 5.0),
    ("tf32: true", "train", True),
    ("fused_head: off", "train", "off"),
    ("fused_head: on", "train", "on"),
    ("fused_head: auto", "train", "auto"),
    ("nonfinite: skip", "train", "skip"),
    ("nonfinite_limit: 3", "train", 3),
    ("max_hours: 11.5", "output", 11.5),
    ("stop_grace_seconds: 120", "output", 120.0),
    ("train_type: static_full", "flex", ("static",)),
    ("components_cfg_file: src/dataflex/configs/components.yaml", "flex", "components.yaml"),
    ("component_name: less", "flex", "less"),
    ("component_params: {select: {seed: 1}}", "flex", {"select": {"seed": 1}}),
    ("component_modules: my_pkg.my_selector", "flex", ("my_pkg.my_selector",)),
    ("warmup_step: 10", "flex", 10),
    ("update_step: 10", "flex", 10),
    ("update_times: -1", "flex", -1),
    ("train_step: 500", "flex", 500),
    ("mixture_sample_rule: stratified", "flex", "stratified"),
    ("init_mixture_proportions: [0.7, 0.3]", "flex", (0.7, 0.3)),
    ("init_mixture_proportions: 1, 3", "flex", (1.0, 3.0)),
    ("static_mix: true", "flex", True),
    ("mix_strategy: interleave_under", "flex", "interleave_under"),
    ("mix_strategy: interleave_once", "flex", "concat"),
    ("mixer_eval_dataset: a,b", "flex", ("a", "b")),
    ("warn_domain_epochs: 2", "flex", 2.0),
    ("reference_model_path: runs/reference", "flex", "runs/reference"),
    ("proxy_model_name_or_path: org/small", "flex", "org/small"),
    ("proxy_train_step: 100", "flex", 100),
    ("freeze_gate: true", "flex", True),
    ("weight_normalization: tokens", "flex", "tokens"),
    ("scoring_batch_tokens: 65536", "flex", 65536),
    ("export_dir: merged", "export", "merged"),
    ("export_size: 2", "export", 2.0),
    ("infer_dtype: bfloat16", "export", "bfloat16"),
    ("score_shard_samples: 16", "score", 16),
    ("keep_features: true", "score", True),
    ("features_dir: /data/features", "score", "/data/features"),
    ("score_token_losses: true", "score", True),
    ("embed_neighbours: 100", "score", 100),
    ("dry_run: true", "score", True),
    ("select_from: [one, two]", "score", ("one", "two")),
    ("select_aggregate: round_robin", "score", "round_robin"),
    ("select_weights: [1e-5, 2]", "score", (1e-5, 2.0)),
    ("select_weights: 1, 2", "score", (1.0, 2.0)),
    ("select_count: 100", "score", 100),
    ("select_fraction: 0.05", "score", 0.05),
    ("select_quotas: equal", "score", "equal"),
    ("select_quotas: {a: 2, b: 1.5}", "score", {"a": 2.0, "b": 1.5}),
    ("select_duplicates: 0.95", "score", 0.95),
    ("select_dir: chosen", "score", "chosen"),
]


def load(folder: Path, text: str) -> Config:
    given = {line.partition(":")[0] for line in text.splitlines()}
    required = {"model_name_or_path": "org/model", "dataset": "a,b", "output_dir": "out"}
    required |= {"per_device_train_batch_size": "8", "lr_scheduler_type": "linear"}
    rest = "".join(f"{key}: {value}\n" for key, value in required.items() if key not in given)
    (folder / "run.yaml").write_text(f"{text}\n{rest}", encoding="utf-8")
    return load_config(folder / "run.yaml", quiet=True)


@pytest.mark.parametrize(("text", "section", "value"), KEYS)
def test_key_is_taken_with_its_type(tmp_path: Path, text: str, section: str, value: Any) -> None:
    cfg = load(tmp_path, text)
    found = getattr(getattr(cfg, section), text.partition(":")[0])
    assert found == value
    assert type(found) is type(value) or text.startswith("val_size")


def test_every_key_is_in_the_table_and_in_one_section() -> None:
    assert {text.partition(":")[0] for text, _, _ in KEYS} == set(SECTION_OF)
    assert len(SECTION_OF) == sum(len(section.model_fields) for section in SECTIONS.values())


@pytest.mark.parametrize("text", [text for text, _, _ in KEYS])
def test_null_means_the_default(tmp_path: Path, text: str) -> None:
    key = text.partition(":")[0]
    if key not in ("model_name_or_path", "dataset", "output_dir"):
        assert load(tmp_path, f"{key}: null").dump_flat() == load(tmp_path, "").dump_flat()


def test_defaults_are_those_of_transformers_and_llama_factory(tmp_path: Path) -> None:
    """Of `transformers.TrainingArguments` and LLaMA-Factory's arguments where they have the key."""
    cfg = load(tmp_path, "")
    assert cfg.train.model_dump() == {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": 8,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "warmup_steps": 0,
        "num_train_epochs": 3.0,
        "max_steps": -1,
        "bf16": False,
        "fp16": False,
        "seed": 42,
        "data_seed": None,
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "deepspeed": None,
        "ddp_timeout": 1800,
        "group_by_length": False,
        "layer_lr_multipliers": None,
        "loraplus_lr_ratio": None,
        "lr_scheduler_kwargs": None,
        "neftune_noise_alpha": None,
        "tf32": None,
        "fused_head": "auto",
        "nonfinite": "stop",
        "nonfinite_limit": 10,
    }
    method = cfg.method
    assert (method.lora_rank, method.lora_scale_alpha, method.lora_dropout, method.lora_target) == (
        8,
        16,
        0.0,
        ("all",),
    )
    assert (cfg.data.cutoff_len, cfg.data.val_size, cfg.output.save_steps, cfg.output.logging_steps) == (
        2048,
        0,
        500,
        10,
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E4", 1e4), ("5.", 5.0), (".5", 0.5), ("-1.5e+3", -1500.0), ("1_000", 1000),
        ("no", "no"), ("on", "on"), ("Yes", "Yes"), ("true", True), ("False", False), ("010", "010"), ("0", 0),
        ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("~", None), ("null", None), ("e5", "e5"), ("1e", "1e"),
        ("0x10", "0x10"), ("-", None), ("q_proj,v_proj", "q_proj,v_proj"), ("'1e-4'", "1e-4"),
    ],
)  # fmt: skip
def test_yaml_scalars(text: str, value: Any) -> None:
    found = parse_yaml(text, "x")
    assert found == ([None] if text == "-" else value)
    assert text == "-" or type(found) is type(value)


@pytest.mark.parametrize("text", [text for text, _, _ in KEYS])
def test_the_effective_config_loads_to_the_same_one(tmp_path: Path, text: str) -> None:
    cfg = load(tmp_path, text)
    again = load(tmp_path, yaml.safe_dump(cfg.dump_flat(), sort_keys=False))
    assert again == cfg


RUNNABLE = sorted(p.name for p in packaged_folder().glob("*.yaml") if p.name != "components.yaml")


def test_there_is_a_runnable_yaml_per_algorithm() -> None:
    names = {"less", "loss_select", "random_select", "custom_select", "random_mix", "static_mix"}
    names |= {"stratified_mix", "loss_weight", "custom_weight", "static", "full", "freeze"}
    assert names <= {name.removesuffix(".yaml") for name in RUNNABLE}


@pytest.mark.parametrize("name", RUNNABLE)
def test_packaged_yaml_loads_without_notes_and_round_trips(tmp_path: Path, name: str) -> None:
    cfg = load_config(packaged_folder() / name, quiet=True)
    assert cfg.notes == ()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg.dump_flat()))
    again = load_config(tmp_path / "config.yaml", quiet=True)
    assert again.dump_flat() == cfg.dump_flat()
    assert len((packaged_folder() / name).read_text().splitlines()) <= 40


def test_derived_values(tmp_path: Path) -> None:
    cfg = load(tmp_path, "lora_rank: 16\neval_dataset: c\neval_strategy: steps\nlogging_steps: 7\nstage: pt")
    assert cfg.method.lora_scale_alpha == 32
    assert cfg.output.eval_steps == 7
    assert cfg.packs and not load(tmp_path, "stage: pt\npacking: false").packs
    assert load(tmp_path, "neat_packing: true").packs and not load(tmp_path, "").packs
    assert load(tmp_path, "max_steps: 9").fixed_steps == 9
    assert load(tmp_path, "train_step: 8").fixed_steps == 8
    assert load(tmp_path, "").fixed_steps is None
    assert load(tmp_path, "").method.checkpoint_activations
    assert not load(tmp_path, "disable_gradient_checkpointing: true").method.checkpoint_activations


def test_sections_are_frozen(tmp_path: Path) -> None:
    cfg = load(tmp_path, "")
    with pytest.raises(ValueError, match="frozen"):
        cfg.train.seed = 3


def test_components_by_kind(tmp_path: Path) -> None:
    names = "component_name: {select: less, weight: loss}\nupdate_step: 1\nval_size: 0.1\n"
    flex = load(tmp_path, f"train_type: [dynamic_weight, dynamic_select]\n{names}").flex
    assert flex.kinds == ("select", "weight")
    assert [flex.component(kind) for kind in ("select", "mix", "weight")] == ["less", None, "loss"]
    flex = load(tmp_path, "train_type: dynamic_weight\ncomponent_name: loss").flex
    assert [flex.component(kind) for kind in ("select", "mix", "weight")] == [None, None, "loss"]
