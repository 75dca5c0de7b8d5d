"""Learning-rate schedules: transformers' names, and the options that each takes (`lr_scheduler_kwargs`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from dataflex.config.sections.fields import LARGEST, check, refuse_secrets, shown, to_choice, to_number
from dataflex.utils.errors import cut, listed, nearest

if TYPE_CHECKING:
    from dataflex.config.sections.train import TrainSection

_FORMS = ("linear", "cosine", "1-sqrt")
_LEAST = ("min_lr", "min_lr_rate")
OPTIONS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", *_LEAST),
    "cosine_warmup_with_min_lr": ("num_cycles", *_LEAST, "warmup_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": (
        "num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles",
    ),
    "constant": (),
    "constant_with_warmup": (),
}  # fmt: skip
SCHEDULERS = tuple(OPTIONS)


def _number(low: float | None = None, above: float | None = None) -> Callable[[Any], float]:
    bound = f" >= {low:g}" if low is not None else f" > {above:g}" if above is not None else ""

    def convert(value: Any) -> float:
        number = to_number(value, f"a number{bound}")
        if (low is not None and number < low) or (above is not None and number <= above):
            raise ValueError(f"expected a number{bound}, got {shown(value)}")
        return number

    return convert


def _steps(low: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        expected = f"a whole number >= {low}"
        number = to_number(value, expected)
        if number != int(number) or not low <= number <= LARGEST:
            raise ValueError(f"expected {expected}, got {shown(value)}")
        return int(number)

    return convert


_VALUES: dict[str, Callable[[Any], Any]] = {
    "num_cycles": _number(above=0),
    **dict.fromkeys(("min_lr", "min_lr_rate", "warmup_lr_rate", "min_lr_ratio", "lr_end"), _number(low=0)),
    "power": _number(above=0),
    "timescale": _steps(1),
    "num_decay_steps": _steps(0),
    "num_stable_steps": _steps(0),
    **dict.fromkeys(("warmup_type", "decay_type"), to_choice(_FORMS, {})),
}


def _to_options(value: Any) -> dict[str, Any]:
    """Options with their values as numbers: YAML reads 1e-6 as text."""
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping such as {{min_lr: 1.0e-6}}, got {shown(value)}")
    refuse_secrets(value)
    made = {}
    for name, option in value.items():
        if name not in _VALUES:
            raise ValueError(f"unknown option {shown(name)}{nearest(str(name), _VALUES)}; valid: {listed(_VALUES)}")
        if option is not None:
            try:
                made[name] = _VALUES[name](option)
            except ValueError as exc:
                raise ValueError(f"{name}: {exc}") from None
    return made


SchedulerOptions = Annotated[dict[str, Any] | None, check(_to_options)]


def problems(train: TrainSection) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys, text) of what a schedule of ours cannot be made with."""
    name, options, keys = train.lr_scheduler_type, train.lr_scheduler_kwargs or {}, ("lr_scheduler_kwargs",)
    takes = OPTIONS[name]
    for option in options:
        if option not in takes:
            text = f"{name} has no option '{cut(option)}'{nearest(option, takes)}; it has {listed(takes) or 'none'}"
            yield (*keys, "lr_scheduler_type"), text
    if "min_lr" in takes and len(set(_LEAST) & set(options)) != 1:
        text = f"{name} needs one of min_lr and min_lr_rate, such as lr_scheduler_kwargs: {{min_lr: 1.0e-6}}"
        yield (*keys, "lr_scheduler_type"), text
    if "min_lr" in takes and "min_lr" in options and train.learning_rate == 0:
        yield (*keys, "learning_rate"), "min_lr needs a learning_rate > 0"
    end = options.get("lr_end", 1e-7)  # transformers' default
    if name == "polynomial" and end >= train.learning_rate:
        text = f"lr_end {end:g} is not below learning_rate {train.learning_rate:g}"
        yield (*keys, "learning_rate", "lr_scheduler_type"), text
