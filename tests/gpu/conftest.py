"""`device`: what $DATAFLEX_TEST_DEVICE names, else cuda, and then the test is marked ``gpu``."""

from __future__ import annotations

import os

import pytest
import torch

ASKED = os.environ.get("DATAFLEX_TEST_DEVICE", "cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        marks = [pytest.mark.gpu] if ASKED == "cuda" else []
        metafunc.parametrize("device", [pytest.param(torch.device(ASKED), id=ASKED, marks=marks)])
