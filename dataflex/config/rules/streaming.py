"""What `streaming: true` goes without: a pool whose samples are all known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dataflex.utils.errors import UserError

if TYPE_CHECKING:
    from dataflex.config.schema import Config

BY_SIZE = ("stratified", "temperature")


def needs_known_data(cfg: Config, command: str) -> None:
    """UserError where ``command`` is given streams."""
    if cfg.data.streaming:
        raise UserError(
            f"streaming: dataflex-cli {command} needs all samples at hand, which a stream does not have; "
            "set streaming: false"
        )


def problems(cfg: Config, embedded: bool) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys, text) of every key that cannot be used with streams; the first key is where it is reported."""
    if not cfg.data.streaming:
        return
    if embedded:
        yield ("streaming",), "true is for dataflex-cli train; dataflex.initialize takes map-style datasets"
        return
    yield from _data(cfg)
    yield from _decisions(cfg)
    flex, train, output = cfg.flex, cfg.train, cfg.output
    counted = flex.update_step and flex.update_times > 0 and "mix" in flex.kinds
    if cfg.fixed_steps is None and not counted:
        text = (
            "missing: streams have no end, so streaming: true needs max_steps or train_step (mixing: or update_times)"
        )
        yield ("max_steps", "train_step", "update_step", "update_times", "train_type", "streaming"), text
    if train.group_by_length:
        text = "true needs the lengths of all samples, which streaming: true does not know; drop one of them"
        yield ("group_by_length", "streaming"), text
    for key, value, instead in (
        ("eval_strategy", output.eval_strategy, "steps with eval_steps"),
        ("save_strategy", output.save_strategy, "steps with save_steps"),
    ):
        if value == "epoch":
            yield (key, "streaming"), f"'epoch' is not known of streams (streaming: true); use {instead}"


def _data(cfg: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    data, weighting = cfg.data, cfg.weighting
    if data.val_size:
        text = "a part of a stream (streaming: true) cannot be held out; use eval_dataset"
        yield ("val_size", "streaming"), text
    if data.tokenized_path is not None:
        text = "streaming: true tokenises as it reads and keeps nothing; drop one of them"
        yield ("tokenized_path", "streaming"), text
    if data.sample_weight is not None:
        text = "streamed samples (streaming: true) have no weights of their own; use domain_weights or a weighter"
        yield ("sample_weight", "streaming"), text
    elif weighting.draws:
        key = "sampling" if weighting.sampling is not None else "sample_weight_as"
        text = "weighted draws need all samples at hand, which streaming: true does not have; drop one of them"
        yield (key, "sampling", "sample_weight_as", "streaming"), text


def _decisions(cfg: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    flex = cfg.flex
    if "select" in flex.kinds:
        text = "dynamic_select chooses among all samples, which streaming: true does not have; set streaming: false"
        yield ("train_type", "streaming"), text
    if "mix" not in flex.kinds:
        return
    mixer = flex.component("mix")
    if mixer in BY_SIZE or flex.mixture_sample_rule == "stratified":
        key, value = ("component_name", mixer) if mixer in BY_SIZE else ("mixture_sample_rule", "stratified")
        text = f"'{value}' mixes by the sizes of the datasets, which streaming: true does not know"
        yield (key, "component_name", "train_type", "streaming"), f"{text}; give init_mixture_proportions"
    if mixer == "dynamic_moe" and not flex.mixer_eval_dataset:
        text = "dynamic_moe looks at samples ahead, which streaming: true cannot; set mixer_eval_dataset"
        yield ("component_name", "mixer_eval_dataset", "streaming"), text
