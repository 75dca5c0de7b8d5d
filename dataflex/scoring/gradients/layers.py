"""Which trained parameters a gradient feature is made of, and how much each counts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dataflex.utils.errors import UserError, nearest

_ENDS = re.compile(r"(first|last):([1-9]\d*)")
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def layer_number(name: str) -> int | None:
    """The first number among the dotted parts of a parameter's name: the layer that it lies in."""
    found = _NUMBER.search(name)
    return int(found.group(1)) if found else None


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that ``pattern`` means.

    A whole name is itself. ``last:4`` and ``first:2`` are the parameters of that many numbered layers (of those in
    ``names``); with * or ? a pattern is compared with the whole name; else it must be a run of whole dotted parts
    (``q_proj``, ``layers.3``, ``lora_B``).
    """
    names = list(names)
    if pattern in names:
        return [pattern]
    ends = _ENDS.fullmatch(pattern)
    if ends:
        numbers = sorted({n for name in names if (n := layer_number(name)) is not None})
        count = int(ends.group(2))
        chosen = set(numbers[:count] if ends.group(1) == "first" else numbers[-count:])
        return [name for name in names if layer_number(name) in chosen] if count <= len(numbers) else []
    if "*" in pattern or "?" in pattern:
        return [name for name in names if fnmatchcase(name, pattern)]
    return [name for name in names if f".{pattern}." in f".{name}."]


@dataclass(frozen=True)
class LayerRule:
    """layers: patterns of `matching`, () for every trained parameter. weights: {pattern: factor > 0}.

    A pattern with ``!`` before it leaves out what it matches, wherever it stands among the layers; where all have one,
    what they leave out is left out of every trained parameter.

    A feature is the concatenation of factor_p * transformed gradient of p over the chosen parameters p, so
    that p counts factor_p^2 times in inner products and norms. A parameter that several patterns match has the
    product of their factors, one that none matches has 1.
    """

    layers: tuple[str, ...] = ()
    weights: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, layers: Sequence[str] | None, weights: Mapping[str, float] | None) -> LayerRule:
        """From a component's params ``layers`` and ``layer_weights``. UserError for a factor that is not > 0."""
        for pattern, factor in (weights or {}).items():
            number = isinstance(factor, int | float) and not isinstance(factor, bool)
            if not number or not math.isfinite(factor) or factor <= 0:
                raise UserError(f"layer_weights: {pattern}: expected a number > 0, got {factor!r}")
        if isinstance(layers, str):
            raise UserError(f"layers: expected a list of patterns, got the text '{layers}'; write [{layers}]")
        return cls(tuple(map(str, layers or ())), tuple((str(p), float(f)) for p, f in (weights or {}).items()))

    def factors(self, names: Sequence[str]) -> dict[str, float]:
        """{chosen name: factor} of the trained parameters ``names``. UserError for a pattern without a match."""
        taken = [pattern for pattern in self.layers if not pattern.startswith("!")]
        chosen = {n for pattern in taken for n in _some(pattern, names, "layers")} if taken else set(names)
        for pattern in self.layers:
            if pattern.startswith("!"):
                chosen -= set(_some(pattern[1:], names, "layers"))
        if not chosen:
            raise UserError(f"layers: {', '.join(self.layers)} leaves no trained parameter")
        factors = {name: 1.0 for name in names if name in chosen}
        for pattern, factor in self.weights:
            for name in _some(pattern, list(factors), "layer_weights"):
                factors[name] *= factor
        return factors


def _some(pattern: str, names: Sequence[str], key: str) -> list[str]:
    found = matching(pattern, names)
    if found:
        return found
    layers = len({layer_number(name) for name in names} - {None})
    if _ENDS.fullmatch(pattern):
        raise UserError(f"{key}: '{pattern}': there are trained parameters in {layers} numbered layers")
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    raise UserError(
        f"{key}: '{pattern}' matches no trained parameter{nearest(pattern, [*parts, *names])}; valid: first:N, last:N, "
        f"a name with * or ?, or parts of a name, each with ! before it to leave it out: {', '.join(parts)}"
    )
