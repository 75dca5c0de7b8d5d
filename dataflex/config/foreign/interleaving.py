"""LLaMA-Factory's interleaving of datasets by `mix_strategy` and `interleave_probs`: a fixed mixture here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex.config.sections.fields import names_of

PROBABILITIES, STRATEGY = "interleave_probs", "mix_strategy"
KEYS = (PROBABILITIES,)
INTERLEAVED = ("interleave_under", "interleave_over")


def added(asked: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """(our keys that ``asked`` makes of ``values``, notes as (key, text)).

    asked: those of `KEYS` that are given. values: our own keys, as given. ValueError, with the key and a text for the
    user, where they do not go together.
    """
    probabilities, strategy = asked.get(PROBABILITIES) or None, values.get(STRATEGY)
    if strategy not in INTERLEAVED:
        if probabilities is not None and strategy != "interleave_once":
            raise ValueError(PROBABILITIES, f"needs {STRATEGY}: {' or '.join(INTERLEAVED)}")
        text = "not used: every sample comes once, in the order of the plan"
        return {}, [(PROBABILITIES, text)] if probabilities is not None else []
    made: dict[str, Any] = {}
    if probabilities is not None:
        if values.get("init_mixture_proportions") is not None:
            raise ValueError(PROBABILITIES, "means the same as init_mixture_proportions, which is set too; keep one")
        made["init_mixture_proportions"] = probabilities
    types = names_of(values.get("train_type"))
    if "dynamic_mix" in types or values.get("streaming") or len(names_of(values.get("dataset"))) == 1:
        return made, []
    made["train_type"] = [*(t for t in types if t not in ("static", "static_full")), "dynamic_mix"]
    made["static_mix"] = True
    component, kinds = values.get("component_name"), [t.removeprefix("dynamic_") for t in types]
    if component is not None and not isinstance(component, Mapping):
        made["component_name"] = {kind: component for kind in kinds if kind in ("select", "weight")}
    return made, []
