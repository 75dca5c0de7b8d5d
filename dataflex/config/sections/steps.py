"""Fields that count steps, or say a share of them: logging_steps, eval_steps, save_steps, warmup_steps."""

from __future__ import annotations

import math
from typing import Annotated, Any

from dataflex.config.sections.fields import LARGEST, Validator, check, shown, to_number


def steps_of(value: int | float, total_steps: int) -> int:
    """Steps that a `Steps` field means: those given, or that share of all steps, rounded up as transformers does."""
    return math.ceil(total_steps * value) if value < 1 else int(value)


def _to_steps(low: int) -> Validator:
    """Steps >= low, or a share of all steps as transformers has it."""
    expected = f"a whole number >= {low}, or a share of all steps > 0 and < 1"

    def convert(value: Any) -> int | float:
        number = to_number(value, expected)
        if 0 < number < 1:
            return number
        if number != int(number) or number < low:
            raise ValueError(f"expected {expected}, got {shown(value)}")
        if number > LARGEST:
            raise ValueError(f"expected a whole number <= {LARGEST:,}, got {shown(value)}")
        return int(number)

    return convert


Steps = Annotated[int | float, check(_to_steps(1))]
OptionalSteps = Annotated[int | float | None, check(_to_steps(1))]
WarmupSteps = Annotated[int | float, check(_to_steps(0))]
