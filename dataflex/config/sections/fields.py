"""Field types of the config: each validator accepts what YAML files really hold and says what it expected.

A validator gets the YAML value (a null never reaches it) and raises ValueError("expected ..., got ...").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from dataflex.config.secrets import NO_SECRET, is_secret, secret_places
from dataflex.config.yaml_reader import kind_of
from dataflex.utils.errors import cut, nearest
from dataflex.utils.errors import shown as shown_value
from dataflex.utils.files import unusable_path

Validator = Callable[[Any], Any]
LARGEST = 2**31 - 1  # of what is counted: lengths are int32, and plans of more steps fit no memory
LONGEST_TEXT = 4096
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def shown(value: object) -> str:
    """A value as errors show it."""
    return kind_of(value) if isinstance(value, Mapping | list | tuple) else shown_value(value)


def check(convert: Validator) -> BeforeValidator:
    """The field type's validator; a null passes."""
    return BeforeValidator(lambda value: value if value is None else convert(value))


def to_flag(value: Any) -> bool:
    """true/false, or the words yes, no, on, off."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _WORDS:
        return _WORDS[value.strip().lower()]
    raise ValueError(f"expected true or false, got {shown(value)}")


def to_number(value: Any, expected: str) -> float:
    """A finite number; ``expected`` says in the error what would be one."""
    if not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError(f"expected {expected}, got {shown(value)}")


def whole(low: int, also: int | None = None, high: int = LARGEST) -> BeforeValidator:
    """A whole number >= low (and <= high, which only an error names), or the special value ``also``."""
    expected = f"a whole number >= {low}" + (f" or {also}" if also is not None else "")

    def convert(value: Any) -> int:
        number = to_number(value, expected)
        if number != int(number) or (number < low and number != also):
            raise ValueError(f"expected {expected}, got {shown(value)}")
        if int(number) > high:
            raise ValueError(f"expected a whole number <= {high:,}, got {shown(value)}")
        return value if isinstance(value, int) else int(number)

    return check(convert)


def real(
    low: float, high: float = math.inf, *, above: bool = False, below: bool = False, most: float = math.inf
) -> BeforeValidator:
    """A finite number in [low, high]; ``above`` and ``below`` leave the bound itself out.

    most: a further bound, which only an error names.
    """
    expected = f"a number {'>' if above else '>='} {low:g}"
    if high < math.inf:
        expected += f" and {'<' if below else '<='} {high:g}"

    def convert(value: Any) -> float:
        number = to_number(value, expected)
        if number < low or number > high or (above and number == low) or (below and number == high):
            raise ValueError(f"expected {expected}, got {shown(value)}")
        if number > most:
            raise ValueError(f"expected a number <= {most:g}, got {shown(value)}")
        return number

    return check(convert)


def to_text(value: Any) -> str:
    """Text; a whole number is taken as its digits."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18:
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {shown(value)} (put it in quotes)")
    if not value.strip():
        raise ValueError("expected text, got an empty string")
    if len(value) > LONGEST_TEXT:
        raise ValueError(f"expected at most {LONGEST_TEXT:,} characters, got {len(value):,}")
    if not value.isprintable():
        raise ValueError(f"expected printable text on one line, got {shown(value)}")
    if is_secret(value):
        raise ValueError(
            "expected no password or access token: it would be written into the run's folder; set HF_TOKEN"
        )
    return value.strip()


def to_path(value: Any) -> str:
    """Text that a file, a folder or a model can be called by."""
    text = to_text(value)
    problem = unusable_path(text)
    if problem:
        raise ValueError(f"expected a path or a name, got {shown(text)}: {problem}")
    return text


def to_names(value: Any) -> tuple[str, ...]:
    """A comma list ("a,b") or a YAML list of names."""
    items = value.split(",") if isinstance(value, str) else value
    if isinstance(items, int) and not isinstance(items, bool):
        items = [items]
    if not isinstance(items, list | tuple):
        raise ValueError(f"expected names (a list, or text with commas), got {shown(value)}")
    if any(isinstance(item, str) and not item.strip() for item in items):
        raise ValueError("expected names, got an empty one (a comma too many?)")
    return tuple(to_path(item) for item in items)


def names_of(value: Any) -> list[str]:
    """The names in a value as given, whatever else may be wrong with it."""
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [str(name) for name in value]
    return [name.strip() for name in str(value).split(",")]


def to_choice(valid: tuple[str, ...], same: Mapping[str, str]) -> Validator:
    """The validator of one of ``valid`` or of their other spellings."""

    def convert(value: Any) -> str:
        word = "no" if value is False and "no" in valid else value
        word = same.get(word, word) if isinstance(word, str) else word
        if not isinstance(word, str) or word not in valid:
            hint = nearest(str(value), valid)
            raise ValueError(f"expected one of {', '.join(valid)}, got {shown(value)}{hint}")
        return str(word)

    return convert


def choice(*valid: str, **same: str) -> BeforeValidator:
    """One of ``valid``; ``same`` maps other spellings to them; false means "no" where that is valid."""
    return check(to_choice(valid, same))


def choices(*valid: str, **same: str) -> BeforeValidator:
    """A comma list or YAML list of distinct words out of ``valid``."""
    one = to_choice(valid, same)

    def convert(value: Any) -> tuple[str, ...]:
        words = tuple(one(name) for name in to_names(value))
        for i, word in enumerate(words):
            if word in words[:i]:
                raise ValueError(f"'{word}' is listed twice")
        return words

    return check(convert)


def _to_proportions(value: Any) -> tuple[float, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        raise ValueError(f"expected a list of proportions, one per dataset, got {shown(value)}")
    shares = tuple(to_number(item, "finite proportions") for item in items)
    if any(share < 0 for share in shares):
        raise ValueError(f"expected proportions >= 0, got {min(shares):g}")
    if sum(shares) == 0:
        raise ValueError("expected at least one proportion > 0, got all zero")
    return shares


def _to_val_size(value: Any) -> float:
    expected = "a fraction >= 0 and < 1, or a whole number of samples >= 2"
    number = to_number(value, expected)
    if number < 0 or number == 1 or (number > 1 and number != int(number)):
        raise ValueError(f"expected {expected}, got {shown(value)}")
    return number


def _to_layers(value: Any) -> int:
    expected = "a whole number of layers, > 0 counted from the end, < 0 from the start"
    number = to_number(value, expected)
    if number != int(number) or number == 0:
        raise ValueError(f"expected {expected}, got {shown(value)}")
    return int(number)


def _to_components(value: Any) -> str | dict[str, str]:
    if isinstance(value, Mapping):
        kinds = ("select", "mix", "weight")
        for key in value:
            if key not in kinds:
                hint = nearest(str(key), kinds)
                raise ValueError(f"unknown kind '{cut(str(key))}', expected select, mix or weight{hint}")
        return {key: to_path(name) for key, name in value.items()}
    return to_path(value)


def _to_params(value: Any) -> dict[str, dict[str, Any]]:
    kinds = ("select", "mix", "weight")
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping such as {{select: {{seed: 1}}}}, got {shown(value)}")
    refuse_secrets(value)
    for key, params in value.items():
        if key not in kinds:
            raise ValueError(f"unknown kind '{key}', expected select, mix or weight{nearest(str(key), kinds)}")
        if not isinstance(params, Mapping):
            raise ValueError(f"expected a mapping of params for {key}, got {shown(params)}")
    return {key: {str(name): param for name, param in params.items()} for key, params in value.items()}


def refuse_secrets(value: Any) -> None:
    """ValueError where a mapping's values hold what config.yaml must not."""
    for place in secret_places(value):
        raise ValueError(f"{place} {NO_SECRET}")


def _to_deepspeed(value: Any) -> str | dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else to_path(value)


def _to_resume(value: Any) -> str | bool:
    """true, false, auto, or a checkpoint's folder."""
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    if isinstance(value, str) and value.strip().lower() not in _WORDS:
        return to_path(value)
    return to_flag(value)


def to_weight(value: Any, of: str) -> float:
    """A finite number >= 0; ``of`` says whose."""
    number = to_number(value, f"a finite weight >= 0 for {of}")
    if number < 0:
        raise ValueError(f"expected a finite weight >= 0 for {of}, got {shown(value)}")
    return number


def to_weights(value: Any) -> dict[str, float]:
    """A mapping of names to finite numbers >= 0."""
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"expected a mapping of names to weights, got {shown(value)}")
    return {to_text(name): to_weight(weight, f"'{cut(str(name))}'") for name, weight in value.items()}


Flag = Annotated[bool, check(to_flag)]
OptionalFlag = Annotated[bool | None, check(to_flag)]
Text = Annotated[str, check(to_path)]
OptionalText = Annotated[str | None, check(to_path)]
LongText = Annotated[str | None, check(to_text)]
Names = Annotated[tuple[str, ...], check(to_names)]
Weights = Annotated[dict[str, float] | None, check(to_weights)]
Proportions = Annotated[tuple[float, ...] | None, check(_to_proportions)]
ValSize = Annotated[float, check(_to_val_size)]
Layers = Annotated[int, check(_to_layers)]
Components = Annotated[str | dict[str, str] | None, check(_to_components)]
ComponentParams = Annotated[dict[str, dict[str, Any]] | None, check(_to_params)]
DeepSpeedConfig = Annotated[str | dict[str, Any] | None, check(_to_deepspeed)]
Resume = Annotated[str | bool | None, check(_to_resume)]
Count = Annotated[int, whole(0)]
Seed = Annotated[int, whole(0, high=2**63 - 1)]
OptionalSeed = Annotated[int | None, whole(0, high=2**63 - 1)]
Seconds = Annotated[int, whole(1, high=10**9)]
Positive = Annotated[int, whole(1)]
OptionalCount = Annotated[int | None, whole(0)]
OptionalPositive = Annotated[int | None, whole(1)]
PositiveOrOff = Annotated[int, whole(1, also=-1)]
NotNegative = Annotated[float, real(0)]
AboveZero = Annotated[float, real(0, above=True)]
Epochs = Annotated[float, real(0, above=True, most=1e6)]
OptionalAboveZero = Annotated[float | None, real(0, above=True)]
Share = Annotated[float, real(0, 1)]
ShareBelowOne = Annotated[float, real(0, 1, below=True)]
