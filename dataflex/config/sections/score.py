"""The section of the config for scoring passes on disk, and for `dataflex-cli score`, `embed` and `select`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from dataflex.config.sections.fields import Flag, Names, OptionalPositive, OptionalText, Positive, real, to_number
from dataflex.config.sections.section import Section
from dataflex.utils.errors import cut, nearest, shown

QUOTA_WORDS = ("proportional", "equal")


def _to_quotas(value: Any) -> Any:
    """``proportional``, ``equal``, or {domain: share}, shares >= 0 and not all 0."""
    if value is None or (isinstance(value, str) and value in QUOTA_WORDS):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(
            f"expected proportional, equal or a mapping of datasets to shares, got {shown(value)}"
            f"{nearest(str(value), QUOTA_WORDS)}"
        )
    for name, share in value.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1e300:
            raise ValueError(f"expected a share >= 0 for '{cut(str(name))}', got {shown(share)}")
    if not sum(value.values()):
        raise ValueError("expected at least one share > 0")
    return {str(name): float(share) for name, share in value.items()}


def _to_weights(value: Any) -> Any:
    items: Any = value.split(",") if isinstance(value, str) else value
    items = [items] if isinstance(items, int | float) and not isinstance(items, bool) else items
    if items is None:
        return None
    try:
        return tuple(to_number(item, "numbers") for item in items)
    except (TypeError, ValueError):
        raise ValueError(f"expected numbers, one for each folder of select_from, got {shown(value)}") from None


class ScoreSection(Section):
    """Shards of scoring passes; what `score` and `embed` make, and what `select` chooses by."""

    score_shard_samples: Positive = 4096
    keep_features: Flag = False
    features_dir: OptionalText = None
    score_token_losses: Flag = False
    embed_neighbours: OptionalPositive = None
    dry_run: Flag = False
    select_from: Names = ()
    select_aggregate: OptionalText = None
    select_weights: Annotated[tuple[float, ...] | None, BeforeValidator(_to_weights)] = None
    select_count: OptionalPositive = None
    select_fraction: Annotated[float | None, real(0, 1, above=True)] = None
    select_quotas: Annotated[str | dict[str, float] | None, BeforeValidator(_to_quotas)] = None
    select_duplicates: Annotated[float | None, real(0, 1, above=True)] = None
    select_dir: OptionalText = None
