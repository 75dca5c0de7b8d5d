"""What no single field can check: rules between keys (refusals, then notes).

A problem names the key it is reported at first, then the other keys it depends on; it is left out where one
of them is itself wrong.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dataflex.config import deepspeed_json, trackers
from dataflex.config.components import component_params
from dataflex.config.paths import resolve
from dataflex.config.rules import best, commands, packing, streaming
from dataflex.config.schema import Config
from dataflex.config.sections import schedule, weighting
from dataflex.utils.errors import UserError, nearest
from dataflex.utils.files import names_in

WEEK_S = 7 * 24 * 3600
OWN_COLUMNS = ("input_ids", "labels", "sample_weight", "token_weight")
# Keys of the optimizer and the schedule that are made here, where the DeepSpeed config has none.
_OF_OUR_OPTIMIZER = {
    "layer_lr_multipliers": "optimizer",
    "loraplus_lr_ratio": "optimizer",
    "lr_scheduler_kwargs": "scheduler",
}


class Problem(NamedTuple):
    """``keys[0]`` is where it is reported; ``text`` is one line."""

    keys: tuple[str, ...]
    text: str


def problems(cfg: Config, embedded: bool, command: str) -> Iterator[Problem]:
    """Yield every broken rule; ``embedded`` configs get model and data as objects, not by name."""
    if not embedded:
        yield from _required(cfg, command)
    if command in commands.ONLY_LOOK:
        yield from (*_train(cfg), *_deepspeed(cfg), *_paths(cfg))
        return
    yield from (*_data(cfg), *_subtasks(cfg, embedded))
    yield from _train(cfg)
    yield from _deepspeed(cfg)
    if command not in commands.NO_STEPS:
        yield from _length(cfg)
        yield from _schedule(cfg)
    yield from _mixing(cfg)
    for keys, text in weighting.problems(cfg.weighting, cfg.data, cfg.flex.kinds, embedded):
        yield Problem(keys, text)
    for keys, text in (*streaming.problems(cfg, embedded), *packing.problems(cfg), *best.problems(cfg)):
        yield Problem(keys, text)
    yield from _components(cfg, embedded, looks=command != commands.CHOOSES)
    if command != commands.CHOOSES:
        yield from _paths(cfg)


def _required(cfg: Config, command: str) -> Iterator[Problem]:
    for key in commands.missing(cfg, command):
        yield Problem((key,), "missing, this key is required")
    if not cfg.method.do_train and command not in commands.ONLY_LOOK:
        yield Problem(("do_train",), "false is not supported: dataflex-cli train only trains")


def _data(cfg: Config) -> Iterator[Problem]:
    data = cfg.data
    for key in ("dataset", "eval_dataset"):
        names: tuple[str, ...] = getattr(data, key)
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield Problem((key,), f"'{name}' is listed twice")
    if data.val_size and data.eval_dataset:
        text = "cannot be used together with eval_dataset; keep one of them"
        yield Problem(("val_size", "eval_dataset"), text)
    if data.train_on_prompt and data.mask_history:
        yield Problem(("mask_history", "train_on_prompt"), "cannot be used together with train_on_prompt")
    if data.neat_packing and data.packing is False:
        yield Problem(("neat_packing", "packing"), "needs packing: true, or drop packing: false")
    if cfg.output.eval_strategy != "no" and not (data.eval_dataset or data.val_size):
        text = f"'{cfg.output.eval_strategy}' needs eval_dataset or val_size"
        yield Problem(("eval_strategy", "eval_dataset", "val_size"), text)


def _subtasks(cfg: Config, embedded: bool) -> Iterator[Problem]:
    data, keys = cfg.data, ("subtask_column", "eval_dataset", "val_size")
    if data.subtask_column in OWN_COLUMNS:
        yield Problem(keys, f"'{data.subtask_column}' is a column of ours; give the target's another name")
    if data.subtask_column is not None and not embedded and not (data.eval_dataset or data.val_size):
        yield Problem(keys, "is a column of what is evaluated: set eval_dataset (or val_size)")


def _train(cfg: Config) -> Iterator[Problem]:
    train = cfg.train
    if train.bf16 and train.fp16:
        yield Problem(("fp16", "bf16"), "cannot be used together with bf16; keep one of them")
    if train.loraplus_lr_ratio is not None and cfg.method.finetuning_type != "lora":
        yield Problem(("loraplus_lr_ratio", "finetuning_type"), "needs finetuning_type: lora")
    if "scheduler" not in _deepspeed_keys(cfg):
        for keys, text in schedule.problems(train):
            yield Problem(keys, text)
    if train.adam_beta2 == 0 and train.optim.startswith("adamw"):
        yield Problem(("adam_beta2",), "expected a number > 0, got 0")


def _deepspeed(cfg: Config) -> Iterator[Problem]:
    value = cfg.train.deepspeed
    if value is None:
        return
    for key, own in _OF_OUR_OPTIMIZER.items():
        if getattr(cfg.train, key) is not None and own in _deepspeed_keys(cfg):
            article = "an" if own == "optimizer" else "a"
            text = f"has no effect where the DeepSpeed config has {article} {own} of its own; drop one of them"
            yield Problem((key, "deepspeed"), text)
    keys = ("deepspeed", *deepspeed_json.SAME_AS_YAML.values())
    try:
        config = cfg.train.deepspeed_config()
        prefix = f"{resolve(value)}: " if isinstance(value, str) else ""
    except UserError as e:
        yield Problem(("deepspeed",), str(e))
        return
    for text in deepspeed_json.problems(config, cfg.train.model_dump()):
        yield Problem(keys, prefix + text)


def _deepspeed_keys(cfg: Config) -> set[str]:
    """The top-level keys of the DeepSpeed config; none where it cannot be read."""
    try:
        return set(cfg.train.deepspeed_config())
    except UserError:
        return set()


def _length(cfg: Config) -> Iterator[Problem]:
    flex, max_steps = cfg.flex, cfg.train.max_steps
    if flex.train_step and max_steps > 0 and flex.train_step != max_steps:
        text = f"{flex.train_step} contradicts max_steps: {max_steps}; both mean the total number of steps"
        yield Problem(("train_step", "max_steps"), text)
    total = cfg.fixed_steps
    decides = [kind for kind in flex.kinds if not (kind == "mix" and flex.mixes_fixed)]
    if decides and total is not None and flex.warmup_step >= total:
        text = f"{flex.warmup_step} leaves no step after the warm-up: the run ends after {total} steps"
        yield Problem(("warmup_step", "train_step", "max_steps", "train_type"), text)


def _schedule(cfg: Config) -> Iterator[Problem]:
    flex = cfg.flex
    for kind in ("select", "mix"):
        needs = kind in flex.kinds and not (kind == "mix" and flex.mixes_fixed)
        if needs and not flex.update_step:
            got = "got 0" if flex.update_step == 0 else "it is missing"
            text = f"dynamic_{kind} needs a whole number of steps > 0 between decisions, {got}"
            yield Problem(("update_step", "train_type"), text)
            return


def _mixing(cfg: Config) -> Iterator[Problem]:
    flex, names = cfg.flex, cfg.data.dataset
    shares = flex.init_mixture_proportions
    if shares is not None and names and len(shares) != len(names):
        text = f"expected one proportion per dataset ({len(names)}: {', '.join(names)}), got {len(shares)}"
        yield Problem(("init_mixture_proportions", "dataset"), text)
    if shares is not None and flex.mix_strategy == "interleave_over" and min(shares) == 0:
        text = "interleave_over ends when every dataset is used up, and one has the proportion 0"
        yield Problem(("mix_strategy", "init_mixture_proportions"), text)
    if "mix" not in flex.kinds:
        return
    if flex.mixture_sample_rule != "mixture":
        rule = flex.mixture_sample_rule
        if flex.component("mix") is not None:
            text = f"'{rule}' fixes the proportions, so no mixer can act; use mixture, or drop component_name"
            yield Problem(("mixture_sample_rule", "component_name"), text)
        if shares is not None:
            text = f"is not used with mixture_sample_rule: {rule}; use mixture, or drop it"
            yield Problem(("init_mixture_proportions", "mixture_sample_rule"), text)


def _components(cfg: Config, embedded: bool, looks: bool) -> Iterator[Problem]:
    """looks: whether components will look at models and targets."""
    flex = cfg.flex
    if "static" in flex.train_type and len(flex.train_type) > 1:
        yield Problem(("train_type",), "static cannot be combined with a dynamic type")
    one_name_for_all = isinstance(flex.component_name, str)
    if one_name_for_all and len(flex.kinds) > 1:
        mapping = ", ".join(f"{kind}: ..." for kind in flex.kinds)
        yield Problem(("component_name", "train_type"), f"expected one name per type: {{{mapping}}}")
        return
    for kind in flex.kinds:
        if flex.component(kind) is None:
            if not (kind == "mix" and flex.mixes_fixed):
                yield Problem(("component_name", "train_type"), f"missing, dynamic_{kind} needs a component")
            continue
        try:
            name, params = component_params(flex, kind)
        except UserError as e:
            key = "component_name" if " is not in " in str(e) else "components_cfg_file"
            for line in str(e).splitlines():
                yield Problem((key, "component_name", "components_cfg_file", "component_modules"), line)
            continue
        if not looks:
            continue
        selected = dict.fromkeys(("less", "less_head", "rds", "near", "tsds"), "a target to select for")
        aims = {"adapt": "a target to compare with", **selected}
        if name in aims and not embedded and not (cfg.data.eval_dataset or cfg.data.val_size):
            text = f"{name} needs {aims[name]}: set eval_dataset (or val_size)"
            yield Problem(("component_name", "eval_dataset", "val_size"), text)
        for text in _missing_path(params.get("embedding_model")):
            yield Problem(("component_params", "component_name"), f"embedding_model: {text}")


def _paths(cfg: Config) -> Iterator[Problem]:
    paths: dict[str, Any] = {
        "model_name_or_path": cfg.model.model_name_or_path,
        "reference_model_path": cfg.flex.reference_model_path,
        "adapter_name_or_path": cfg.model.adapter_name_or_path,
        "resume_from_checkpoint": cfg.output.resume_path,
    }
    for key, value in paths.items():
        for text in _missing_path(value):
            yield Problem((key,), text)


def _missing_path(value: Any) -> Iterator[str]:
    """What is wrong with a value that can only be a path, not a name of the hub."""
    if isinstance(value, str) and value.startswith(("/", "./", "../", "~")):
        path = Path(value).expanduser()
        if not os.path.exists(path):
            yield f"the path '{value}' does not exist{nearest(path.name, names_in(path.parent))}"


def notes(cfg: Config, embedded: bool, command: str) -> Iterator[Problem]:
    """Yield what is allowed but should be said."""
    if command in commands.ONLY_LOOK:
        return
    for kind in sorted(set(cfg.flex.component_params or {}) - set(cfg.flex.kinds)):
        yield Problem(("component_params",), f"{kind}: not used, since train_type is not dynamic_{kind}")
    if cfg.train.ddp_timeout > WEEK_S:
        days = cfg.train.ddp_timeout / 86400
        text = f"{cfg.train.ddp_timeout} s are {days:,.0f} days: a hang would not end by itself"
        yield Problem(("ddp_timeout",), text)
    if not embedded:
        yield from _filled_in(cfg)
    if cfg.train.warmup_steps and cfg.train.warmup_ratio:
        yield Problem(("warmup_ratio",), f"not used: warmup_steps is {cfg.train.warmup_steps:g}")
    if trackers.nothing_reported(cfg):
        yield Problem(("report_to",), trackers.nothing_reported(cfg))
    if cfg.output.save_only_model:
        text = "true: checkpoints lack the optimizer, so an exact resume is not possible"
        yield Problem(("save_only_model",), text)
    if cfg.output.eval_strategy == "no" and cfg.output.eval_steps is not None:
        yield Problem(("eval_steps",), "not used: eval_strategy is 'no'")
    if "mix" in cfg.flex.kinds and len(cfg.data.dataset) == 1 and not embedded:
        yield Problem(("dataset",), "dynamic_mix has one dataset, so there is nothing to mix")
    for keys, text in (*packing.notes(cfg), *best.notes(cfg)):
        yield Problem(keys, text)
    if cfg.data.streaming and cfg.data.dataloader_num_workers:
        yield Problem(("dataloader_num_workers",), "not used: streams are read in the training process")
    idle = weighting.unused(cfg.weighting)
    if idle:
        yield Problem((idle[0],), f"not used without weighted sampling of that kind: {', '.join(idle)}")
    unused = _unused(cfg)
    if unused:
        types = ", ".join(cfg.flex.train_type)
        yield Problem((unused[0],), f"not used by train_type {types}: {', '.join(unused)}")


def _filled_in(cfg: Config) -> Iterator[Problem]:
    """The defaults that decide most of a run's course, where they are transformers' for want of a key."""
    for key in ("per_device_train_batch_size", "lr_scheduler_type"):
        schedules = key == "lr_scheduler_type" and "scheduler" in _deepspeed_keys(cfg)
        if key not in cfg.train.model_fields_set and not schedules:
            text = f"not given, so {getattr(cfg.train, key)}, as in LLaMA-Factory and transformers"
            yield Problem((key,), text)


def _unused(cfg: Config) -> list[str]:
    kinds = set(cfg.flex.kinds) | ({"stream"} if cfg.data.streaming else set())
    used_by = {
        "component_name": {"select", "mix", "weight"},
        "warmup_step": {"select", "mix", "weight"},
        "update_step": {"select", "mix"},
        "update_times": {"select", "mix"},
        "mixture_sample_rule": {"mix"},
        "init_mixture_proportions": {"mix", "stream"},
        "mix_strategy": {"mix", "stream"},
        "static_mix": {"mix"},
        "mixer_eval_dataset": {"mix"},
        "warn_domain_epochs": {"mix", "stream"},
        "reference_model_path": {"mix", "weight"},
        "proxy_model_name_or_path": {"mix"},
        "proxy_train_step": {"mix"},
    }
    fields = type(cfg.flex).model_fields
    idle = [key for key, users in used_by.items() if not users & kinds]
    return [key for key in idle if getattr(cfg.flex, key) != fields[key].default]
