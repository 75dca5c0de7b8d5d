"""LLaMA-Factory's keys for losses whose tokens are weighted: they add a weighter to whatever else a run asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex.config.sections.fields import names_of, shown
from dataflex.utils.errors import cut

WEIGHTERS = {"use_dft_loss": "dft", "use_eaft_loss": "eaft"}
ALPHA = "eaft_alpha"
KEYS = (*WEIGHTERS, ALPHA)


def added(asked: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """(our keys that ``asked`` makes of ``values``, notes as (key, text)).

    asked: those of `KEYS` that are given. values: our own keys, as given. ValueError, with the key and a text for the
    user, where they do not go together.
    """
    for key in WEIGHTERS:
        if not isinstance(asked.get(key), bool | None):
            raise ValueError(key, f"expected true or false, got {shown(asked[key])}")
    on = [key for key in WEIGHTERS if asked.get(key)]
    alpha = asked.get(ALPHA)
    notes = [(ALPHA, "not used without use_eaft_loss: true")] if alpha is not None and "use_eaft_loss" not in on else []
    if not on:
        return {}, notes
    if len(on) > 1:
        raise ValueError(on[1], f"a run has one weighter of tokens, and {on[0]} is true too; keep one")
    key, name = on[0], WEIGHTERS[on[0]]
    types = names_of(values.get("train_type"))
    components = values.get("component_name")
    kinds = [t.removeprefix("dynamic_") for t in types if t.startswith("dynamic_")]
    mine = components if isinstance(components, Mapping) else {kind: components for kind in kinds}
    if mine.get("weight") not in (None, name):
        raise ValueError(key, f"is the weighter {name}, and component_name is {cut(str(mine['weight']))}; keep one")
    types = [t for t in types if t not in ("static", "static_full")]
    params = dict(values.get("component_params") or {})
    if key == "use_eaft_loss" and alpha is not None:
        params["weight"] = {"alpha": alpha, **params.get("weight", {})}
    others = {kind: component for kind, component in mine.items() if component is not None}
    made: dict[str, Any] = {
        "train_type": [*types, *([] if "dynamic_weight" in types else ["dynamic_weight"])],
        "component_name": {**others, "weight": name},
        **({"component_params": params} if params else {}),
    }
    if "weight_normalization" not in values:
        made["weight_normalization"] = "tokens"
    return made, notes
