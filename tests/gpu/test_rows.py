"""Every op, dtype and option on the device against float64 on the CPU."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch

from dataflex import ops
from tests.gpu.rows import DTYPES, NO_KERNELS, OPTIONS, Row, arguments_of, base, rows, run

# Largest distance from float64, relative to the largest number: results are float32, gradients of the inputs' dtype.
RESULTS = 2e-5
ROUNDED = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def parameters(op: str) -> Iterator[str]:
    of_type = {"sums": ops.Sums, "of": ops.Projection}
    for name in inspect.signature(getattr(ops, op)).parameters:
        yield from (field.name for field in fields(of_type[name])) if name in of_type else (name,)


def test_every_op_and_option_has_a_row() -> None:
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))} - NO_KERNELS
    assert functions == set(OPTIONS)
    for op in functions:
        given = set(base(op, torch.Generator())) - {"logits"} | set(OPTIONS[op])
        asked = set(parameters(op)) - {"logits", "shards"}
        assert asked == given - ({"logits"} if op == "merge_vocab_shards" else set()), op


def cases() -> Iterator[Any]:
    for row in rows():
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            yield pytest.param(row, dtype, id=f"{row.op}-{row.option}-{row.value}-{name}")


@pytest.mark.parametrize(("row", "dtype"), list(cases()))
def test_the_op_equals_float64(row: Row, dtype: torch.dtype, device: torch.device) -> None:
    arguments = arguments_of(row, dtype)
    got = run(row.op, arguments, device, wide=False)
    again = run(row.op, arguments, device, wide=False)
    want = run(row.op, arguments, torch.device("cpu"), wide=True)
    assert set(got) == set(want) and got
    for name, value in got.items():
        exact = want[name]
        assert value.shape == exact.shape and bool(value.isfinite().all()), name
        if not exact.numel():
            continue
        allowed = ROUNDED[dtype] if name.startswith("gradient") or row.option == "half_logits" else RESULTS
        if row.op == "project_zero" or exact.abs().max() == 0:
            allowed += 1e-6
        error = float((value - exact).abs().max() / exact.abs().max().clamp(min=1e-30))
        assert error < allowed, (name, error)
        if not name.startswith("gradient of weight"):
            assert torch.equal(value, again[name]), f"{name}: two runs differ"
