"""The keys of static weights and of weighted sampling: how much samples and tokens count, how likely they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from dataflex.config.sections.fields import (
    NotNegative,
    OptionalFlag,
    OptionalPositive,
    OptionalText,
    Weights,
    check,
    choice,
    shown,
    to_text,
    to_weight,
    to_weights,
)
from dataflex.config.sections.section import Section
from dataflex.utils.errors import cut, nearest

PRESETS = ("inverse_domain", "inverse_class", "temperature")
ROLES = ("prompt", "answer")


def _to_class_weights(value: Any) -> str | dict[str, float]:
    return to_text(value) if isinstance(value, str) else to_weights(value)


def _to_role_weights(value: Any) -> dict[str, float]:
    weights = to_weights(value)
    for role in weights:
        if role not in ROLES:
            raise ValueError(f"unknown role '{cut(role)}', expected {' or '.join(ROLES)}{nearest(role, ROLES)}")
    return weights


def _to_turn_weights(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"expected a list of weights, the last turn's last, got {shown(value)}")
    return tuple(to_weight(weight, f"turn {i - len(value)}") for i, weight in enumerate(value))


def _to_spans(value: Any) -> dict[str, tuple[str | None, float]]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"expected {{start: [end or null, weight]}}, got {shown(value)}")
    spans: dict[str, tuple[str | None, float]] = {}
    for start, pair in value.items():
        if not start or not isinstance(pair, list | tuple) or len(pair) != 2 or pair[0] == "":
            raise ValueError(f"expected [end or null, weight] for {shown(start)}, got {shown(pair)}")
        spans[str(start)] = (None if pair[0] is None else str(pair[0]), to_weight(pair[1], shown(start)))
    return spans


class WeightingSection(Section):
    """How much samples and tokens count, and how likely samples are to be drawn.

    sample_weight (in the data section) is a multiplier of losses, the probability of draws, or both; the presets of
    ``sampling`` multiply the probability. ``sampling_correction`` divides losses by it; null: only with ``both``.
    """

    sample_weight_as: Annotated[Literal["loss", "probability", "both"], choice("loss", "probability", "both")] = "loss"
    domain_weights: Weights = None
    class_weights: Annotated[str | dict[str, float] | None, check(_to_class_weights)] = None
    role_weights: Annotated[dict[str, float] | None, check(_to_role_weights)] = None
    turn_weights: Annotated[tuple[float, ...] | None, check(_to_turn_weights)] = None
    token_weight: OptionalText = None
    token_weight_spans: Annotated[dict[str, tuple[str | None, float]] | None, check(_to_spans)] = None
    sampling: Annotated[Literal["inverse_domain", "inverse_class", "temperature"] | None, choice(*PRESETS)] = None
    sampling_temperature: NotNegative = 0.5
    sampling_replacement: OptionalFlag = None
    sampling_samples: OptionalPositive = None
    sampling_correction: OptionalFlag = None

    @property
    def draws(self) -> bool:
        """Whether draws are weighted."""
        return self.sampling is not None or self.sample_weight_as != "loss"

    def epoch(self, pool_size: int | None) -> int | None:
        """The samples of one pass: ``sampling_samples`` where draws are weighted and it is given, else the pool's.

        pool_size: None of streams.
        """
        return self.sampling_samples if self.draws and self.sampling_samples else pool_size

    @property
    def with_replacement(self) -> bool:
        return self.sampling_replacement is not False

    @property
    def corrected(self) -> bool:
        """Whether losses are divided by the probability of their draw."""
        if self.sampling_correction is None:
            return self.sample_weight_as == "both"
        return self.sampling_correction

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokenising makes weights of tokens."""
        return any(v is not None for v in (self.role_weights, self.turn_weights, self.token_weight)) or (
            self.token_weight_spans is not None
        )


def problems(weighting: WeightingSection, data: Any, kinds: tuple[str, ...], embedded: bool) -> Iterator[Any]:
    """(keys, text) of every broken rule; the first key is where it is reported."""
    sampled = weighting.sampling is not None or weighting.sample_weight_as != "loss"
    if weighting.sample_weight_as != "loss" and data.sample_weight is None and not embedded:
        text = f"{weighting.sample_weight_as} needs sample_weight: a column, a .npy file or an expression"
        yield ("sample_weight_as", "sample_weight"), text
    for kind in ("select", "mix"):
        if sampled and kind in kinds:
            key = "sampling" if weighting.sampling is not None else "sample_weight_as"
            text = f"weighted sampling and dynamic_{kind} both say which samples are drawn; keep one of them"
            yield (key, "train_type", "sampling", "sample_weight_as"), text
    if weighting.sampling_replacement is False and weighting.sampling_samples is None:
        text = "false needs sampling_samples, the distinct samples of a pass: a pass over all is not weighted"
        yield ("sampling_replacement", "sampling_samples"), text
    roles = weighting.role_weights or {}
    if "prompt" in roles and not data.train_on_prompt:
        text = "a weight of prompt needs train_on_prompt: true, else prompts are not trained on"
        yield ("role_weights", "train_on_prompt"), text


def unused(weighting: WeightingSection) -> list[str]:
    """Keys that are set and change nothing."""
    fields = WeightingSection.model_fields
    keys = ("sampling_replacement", "sampling_samples", "sampling_correction")
    idle = [key for key in keys if not weighting.draws and getattr(weighting, key) != fields[key].default]
    if weighting.sampling != "temperature" and weighting.sampling_temperature != 0.5:
        idle.append("sampling_temperature")
    return idle
